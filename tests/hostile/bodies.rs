//! What every parser must do with any bytes: come to an end soon, with `Ok` or `Err` and no panic, and neither read nor
//! write outside of its folder. Shared by `tests/hostile.rs` and the fuzz targets in `fuzz/`.
//!
//! Each function lays the bytes into a folder whose other files are valid, reads it as the commands do, and says
//! whether it was accepted.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each fuzz target uses one of the functions"
)]

use candle_core::Device;
use retune::Result;
use retune::adapter_folder::{Adapter, OtherBase};
use retune::adapters::hooks::NoAdapter;
use retune::adapters::storage::AdapterWeights;
use retune::data::{
    AddSpecial, DataOptions, Dataset, Example, GenerationPrompt, Layout, Message, Order,
    SpecialTokens, Tokenizer, collate, read_prompts,
};
use retune::generate::GenerationConfig;
use retune::inspect::{InspectOptions, inspect};
use retune::model::checkpoint::Checkpoint;
use retune::model::hub::{HubOptions, ModelSource, Token};
use retune::model::{self, Model, ModelConfig};
use retune::pretrain::Shape;
use retune::report::metrics;
use retune::task::causal_lm::score;
use retune::train::{Checkpoints, TrainOptions, Trainer};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

macro_rules! golden {
    ($path:literal) => {
        include_bytes!(concat!("../golden/", $path)).as_slice()
    };
}

/// Name and content of a file.
type File<'a> = (&'a str, &'a [u8]);

pub const CONFIG: &[u8] = golden!("models/llama/config.json");
pub const WEIGHTS: &[u8] = golden!("models/llama/model.safetensors");
pub const TOKENIZER: &[u8] = golden!("models/llama/tokenizer.json");
pub const TOKENIZER_CONFIG: &[u8] = golden!("models/llama/tokenizer_config.json");
pub const GENERATION_CONFIG: &[u8] = golden!("models/llama/generation_config.json");
pub const CHAT_TEMPLATE: &[u8] = golden!("models/llama/chat_template.jinja");
pub const INDEX: &[u8] = golden!("models/llama-sharded/model.safetensors.index.json");
/// A record of every form.
pub const RECORDS: &[u8] = include_bytes!("records.jsonl");
pub const METRICS: &[u8] = include_bytes!("metrics.jsonl");

/// A model, and data for it.
const MODEL: [File<'static>; 7] = [
    ("config.json", CONFIG),
    ("model.safetensors", WEIGHTS),
    ("tokenizer.json", TOKENIZER),
    ("tokenizer_config.json", TOKENIZER_CONFIG),
    ("generation_config.json", GENERATION_CONFIG),
    ("chat_template.jinja", CHAT_TEMPLATE),
    ("data.jsonl", RECORDS),
];

const SHARDS: [File<'static>; 4] = [
    (
        "model-00001-of-00004.safetensors",
        golden!("models/llama-sharded/model-00001-of-00004.safetensors"),
    ),
    (
        "model-00002-of-00004.safetensors",
        golden!("models/llama-sharded/model-00002-of-00004.safetensors"),
    ),
    (
        "model-00003-of-00004.safetensors",
        golden!("models/llama-sharded/model-00003-of-00004.safetensors"),
    ),
    ("model-00004-of-00004.safetensors", OUTSIDE),
];

/// Lies beside the folder, where nothing may look for it: a shard that would fit.
const OUTSIDE: &[u8] = golden!("models/llama-sharded/model-00004-of-00004.safetensors");

/// Configuration and weights of an adapter of each method.
pub const LORA: (&[u8], &[u8]) = (
    golden!("adapters/lora-llama/adapter_config.json"),
    golden!("adapters/lora-llama/adapter_model.safetensors"),
);
pub const LAST_LAYERS: (&[u8], &[u8]) = (
    golden!("adapters/last-layers-llama/adapter_config.json"),
    golden!("adapters/last-layers-llama/adapter_model.safetensors"),
);
pub const PROMPT: (&[u8], &[u8]) = (
    golden!("adapters/prompt-llama/adapter_config.json"),
    golden!("adapters/prompt-llama/adapter_model.safetensors"),
);

/// Words, a mark and what the vocabulary lacks.
const TEXT: &str = "w1 <|user|> w2é \u{10348}</s>";

/// `model.safetensors`.
pub fn checkpoint(bytes: &[u8]) -> bool {
    with_files(&model_with("model.safetensors", bytes), use_model)
}

/// `model.safetensors.index.json`, beside its shards.
pub fn index(bytes: &[u8]) -> bool {
    let mut files = model_with("model.safetensors.index.json", bytes);
    files.retain(|(name, _)| *name != "model.safetensors");
    files.extend(SHARDS);
    with_files(&files, use_model)
}

/// `config.json`.
pub fn config(bytes: &[u8]) -> bool {
    with_files(&model_with("config.json", bytes), use_model)
}

/// `generation_config.json`.
pub fn generation_config(bytes: &[u8]) -> bool {
    with_files(&model_with("generation_config.json", bytes), |folder| {
        let tokenizer = use_tokenizer(folder);
        let model = ModelConfig::read(folder).expect("a valid configuration");
        let read = GenerationConfig::read(folder, &model);
        if let (Ok(config), Some(tokenizer)) = (&read, &tokenizer) {
            let _ = config.options(tokenizer);
        }
        read.is_ok()
    })
}

/// `tokenizer.json`.
pub fn tokenizer(bytes: &[u8]) -> bool {
    let files = model_with("tokenizer.json", bytes);
    with_files(&files, |folder| use_tokenizer(folder).is_some())
}

/// `tokenizer_config.json`.
pub fn tokenizer_config(bytes: &[u8]) -> bool {
    let mut files = model_with("tokenizer_config.json", bytes);
    // It would go before a template in the configuration.
    files.retain(|(name, _)| *name != "chat_template.jinja");
    with_files(&files, |folder| use_tokenizer(folder).is_some())
}

/// `chat_template.jinja`; after a zero byte, the records that it lays out.
pub fn chat_template(bytes: &[u8]) -> bool {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let template = parts.next().unwrap_or_default();
    let mut files = model_with("chat_template.jinja", template);
    files.extend(parts.next().map(|records| ("data.jsonl", records)));
    with_files(&files, |folder| {
        use_tokenizer(folder).is_some_and(|tokenizer| tokenizer.chat_template().is_ok())
    })
}

/// A data file, gzipped or not.
pub fn data(bytes: &[u8]) -> bool {
    with_files(&model_with("data.jsonl", bytes), |folder| {
        let tokenizer = Tokenizer::load(folder).expect("a valid tokenizer");
        use_data(folder, &tokenizer)
    })
}

/// `adapter_config.json`, beside the weights of the method that it speaks of.
pub fn adapter_config(bytes: &[u8]) -> bool {
    let (_, weights) = related(bytes);
    with_files(&adapter_files(bytes, weights), use_adapter)
}

/// `adapter_model.safetensors`, beside the configuration of the method that it speaks of.
pub fn adapter_weights(bytes: &[u8]) -> bool {
    let (config, _) = related(bytes);
    with_files(&adapter_files(config, bytes), use_adapter)
}

/// `retune.json` of an adapter.
pub fn identity(bytes: &[u8]) -> bool {
    let (config, weights) = LORA;
    let mut files = adapter_files(config, weights);
    files.push(("retune.json", bytes));
    with_files(&files, |folder| {
        let _ = use_adapter(folder);
        // Whose base it was, a valid file may say as it likes.
        Adapter::open(folder).is_ok()
    })
}

/// The shape of a base that is pretrained, beside a chat template.
pub fn shape(bytes: &[u8]) -> bool {
    let files = [
        ("shape.toml", bytes),
        ("chat_template.jinja", CHAT_TEMPLATE),
    ];
    with_files(&files, |folder| {
        Shape::read(&folder.join("shape.toml")).is_ok()
    })
}

/// Head and body of what a hub answers, whatever it is asked. Nothing may be written but in the cache.
pub fn hub(bytes: &[u8]) -> bool {
    static HUB: LazyLock<Hub> = LazyLock::new(Hub::start);
    let mut answer = HUB.answer.lock().unwrap_or_else(PoisonError::into_inner);
    bytes.clone_into(&mut answer);
    drop(answer);
    let around = tempfile::tempdir().expect("a folder");
    let options = HubOptions {
        endpoint: HUB.endpoint.clone(),
        token: Some(Token::new("hf_secret").expect("a token")),
        attempts: 1,
        timeout: Duration::from_secs(5),
        ..HubOptions::new(around.path().join("cache"))
    };
    let source = ModelSource::parse("org/tiny").expect("a name");
    let fetched = source.folder(&options, &mut ());
    if let Err(error) = &fetched {
        assert!(!error.to_string().contains("hf_secret"), "{error}");
    }
    let written = fs::read_dir(around.path()).expect("a folder");
    for entry in written {
        assert_eq!(entry.expect("an entry").file_name(), "cache");
    }
    fetched.is_ok()
}

/// A loopback server that answers everything alike.
struct Hub {
    endpoint: String,
    answer: Arc<Mutex<Vec<u8>>>,
}

impl Hub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let answer = Arc::<Mutex<Vec<u8>>>::default();
        let given = Arc::clone(&answer);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
                let asked = BufReader::new(&stream).lines();
                asked
                    .map_while(std::io::Result::ok)
                    .take_while(|line| !line.is_empty())
                    .for_each(drop);
                let bytes = given.lock().unwrap_or_else(PoisonError::into_inner).clone();
                // Who has had enough goes away.
                let _ = stream.write_all(&bytes);
            }
        });
        Self { endpoint, answer }
    }
}

/// The order of the examples.
pub fn order(bytes: &[u8]) -> bool {
    const EXAMPLES: usize = 12;
    with_files(&[("order.txt", bytes)], |folder| {
        let Ok(mut order) = Order::from_file(&folder.join("order.txt"), EXAMPLES) else {
            return false;
        };
        let visited = order.examples(0..40);
        assert!(visited.iter().all(|example| *example < EXAMPLES));
        true
    })
}

/// `metrics.jsonl`.
pub fn metrics_file(bytes: &[u8]) -> bool {
    with_files(&[("metrics.jsonl", bytes)], |folder| {
        metrics::read(&folder.join("metrics.jsonl")).is_ok()
    })
}

/// `run.toml`.
pub fn run_file(bytes: &[u8]) -> bool {
    let files = [("run.toml", bytes), ("metrics.jsonl", METRICS)];
    with_files(&files, |folder| {
        inspect(folder, &InspectOptions::default(), &mut |_, _| Ok(())).is_ok()
    })
}

/// `state.json` of a checkpoint of a run, with checksums that are right: whoever changes the one can change the other.
pub fn state(bytes: &[u8]) -> bool {
    let files = [
        ("weights.safetensors", saved("weights.safetensors")),
        ("optimizer.safetensors", saved("optimizer.safetensors")),
        ("state.json", bytes),
        ("../../../outside.safetensors", OUTSIDE),
    ];
    let line = |(name, bytes): File| format!("{}  {name}\n", sum(bytes));
    use_run(bytes, files.map(line).concat().as_bytes())
}

/// `SHA256SUMS` of a checkpoint of a run.
pub fn sums(bytes: &[u8]) -> bool {
    use_run(saved("state.json"), bytes)
}

/// A file of a run's checkpoint as it was saved.
pub fn saved(name: &str) -> &'static [u8] {
    static FILES: OnceLock<BTreeMap<String, Vec<u8>>> = OnceLock::new();
    let files = FILES.get_or_init(save);
    files.get(name).expect("a file of a checkpoint")
}

fn save() -> BTreeMap<String, Vec<u8>> {
    let (config, weights) = LORA;
    let model = with_files(&adapter_files(config, weights), load_adapter).expect("a valid adapter");
    let options = TrainOptions::default();
    let trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options);
    let run = tempfile::tempdir().expect("a folder");
    let checkpoints = Checkpoints::of_run(run.path());
    let saved = trainer.and_then(|trainer| trainer.save_now(&checkpoints));
    saved.expect("a checkpoint");
    let files = fs::read_dir(run.path().join("checkpoints/step-000000")).expect("the checkpoint");
    files
        .map(|file| {
            let file = file.expect("a file");
            let name = file.file_name().to_string_lossy().into_owned();
            (name, fs::read(file.path()).expect("its content"))
        })
        .collect()
}

fn sum(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Lays `files` into a new folder, of which `read` must leave everything as it is, and everything beside it.
fn with_files<T>(files: &[File], read: impl FnOnce(&Path) -> T) -> T {
    let around = tempfile::tempdir().expect("a folder");
    let folder = around.path().join("inside");
    fs::create_dir(&folder).expect("a folder");
    fs::write(around.path().join("outside.safetensors"), OUTSIDE).expect("written");
    for (name, bytes) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, bytes).expect("written");
    }
    let before = listing(around.path());
    let result = read(&folder);
    assert_eq!(listing(around.path()), before, "something was written");
    result
}

/// Every file below `folder`, with its length and when it was last written.
fn listing(folder: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(listing(&path));
        } else {
            let metadata = path.metadata().expect("a file");
            let written = metadata.modified().expect("a time");
            files.insert(path, (metadata.len(), written));
        }
    }
    files
}

/// The valid model, with one file changed or added.
fn model_with<'a>(name: &'a str, bytes: &'a [u8]) -> Vec<File<'a>> {
    let mut files: Vec<File<'a>> = MODEL.to_vec();
    files.push((name, bytes));
    files
}

/// An adapter and its base in one folder.
fn adapter_files<'a>(config: &'a [u8], weights: &'a [u8]) -> Vec<File<'a>> {
    let mut files = model_with("adapter_config.json", config);
    files.push(("adapter_model.safetensors", weights));
    files
}

/// The valid adapter of the method that `bytes` speak of.
fn related(bytes: &[u8]) -> (&'static [u8], &'static [u8]) {
    let speaks_of = |word: &str| {
        let mut windows = bytes.windows(word.len());
        windows.any(|window| window == word.as_bytes())
    };
    if speaks_of("PROMPT_TUNING") || speaks_of("prompt_embeddings") {
        PROMPT
    } else if speaks_of("lora_") && !speaks_of("dummy-target-modules") {
        LORA
    } else {
        LAST_LAYERS
    }
}

/// Everything that a model's configuration and weights are read for.
fn use_model(folder: &Path) -> bool {
    let _ = inspect(folder, &InspectOptions::default(), &mut |_, _| Ok(()));
    if let Ok(checkpoint) = Checkpoint::open(folder) {
        for (file, _) in checkpoint.shards() {
            assert_beside(file);
        }
    }
    let weights = AdapterWeights::fresh(0, &Device::Cpu);
    use_weights(model::load(folder, &NoAdapter, weights, None))
}

fn use_weights(model: Result<Model>) -> bool {
    let Ok(model) = model else {
        return false;
    };
    let example = Example::new(vec![1, 3, 4], vec![true; 3]);
    let _ = score(model.decoder.as_ref(), &collate(&[&example]));
    true
}

/// Everything that a tokenizer's files are read for.
fn use_tokenizer(folder: &Path) -> Option<Tokenizer> {
    let tokenizer = Tokenizer::load(folder).ok()?;
    if let Ok(tokens) = tokenizer.encode(TEXT, AddSpecial::Yes) {
        let _ = tokenizer.decode(&tokens, SpecialTokens::Skip);
    }
    let _ = tokenizer.encode_continuation(TEXT);
    if let Ok(template) = tokenizer.chat_template() {
        let messages = [
            Message::new("user", TEXT),
            Message::new("assistant", "w3\n"),
        ];
        for prompt in [GenerationPrompt::Add, GenerationPrompt::Omit] {
            let _ = template.render(&messages, None, prompt);
        }
    }
    use_data(folder, &tokenizer);
    Some(tokenizer)
}

/// Everything that a data file is read for.
fn use_data(folder: &Path, tokenizer: &Tokenizer) -> bool {
    let file = folder.join("data.jsonl");
    let _ = read_prompts(&file, Layout::Plain, tokenizer, |_, _| Ok(()));
    let options = DataOptions {
        skip_bad: usize::MAX,
        ..DataOptions::default()
    };
    let Ok(data) = Dataset::load(&[file], tokenizer, &options) else {
        return false;
    };
    for example in &data.examples {
        assert_eq!(example.tokens.len(), example.learn.len());
        assert!(example.prompt_len() <= example.tokens.len());
    }
    true
}

/// Everything that an adapter is read for.
fn use_adapter(folder: &Path) -> bool {
    let options = InspectOptions {
        base: Some(folder),
        ..InspectOptions::default()
    };
    let _ = inspect(folder, &options, &mut |_, _| Ok(()));
    use_weights(load_adapter(folder))
}

fn load_adapter(folder: &Path) -> Result<Model> {
    Adapter::open(folder)?.load_onto(folder, None, OtherBase::Refuse)
}

/// Resumes a run that has this checkpoint.
fn use_run(state: &[u8], sums: &[u8]) -> bool {
    let (config, weights) = LORA;
    let mut files = adapter_files(config, weights);
    files.extend([
        (
            "checkpoints/step-000000/weights.safetensors",
            saved("weights.safetensors"),
        ),
        (
            "checkpoints/step-000000/optimizer.safetensors",
            saved("optimizer.safetensors"),
        ),
        ("checkpoints/step-000000/state.json", state),
        ("checkpoints/step-000000/SHA256SUMS", sums),
    ]);
    with_files(&files, |folder| {
        let checkpoints = Checkpoints::of_run(folder);
        if checkpoints.latest().is_err() {
            return false;
        }
        // Fields that the reader skips may hold what this one refuses.
        if let Ok(state) = serde_json::from_slice::<serde_json::Value>(state) {
            for name in state["bytes"].as_object().expect("it was read").keys() {
                assert_beside(name);
            }
        }
        let model = load_adapter(folder).expect("a valid adapter");
        let options = TrainOptions::default();
        let trainer = Trainer::new(model.decoder.as_ref(), &model.weights, &options);
        let mut trainer = trainer.expect("something to train");
        trainer.resume(&checkpoints).is_ok()
    })
}

/// Asserts that a file that was read lies in the folder of the file that names it.
fn assert_beside(name: &str) {
    let mut components = Path::new(name).components();
    let is_beside = matches!(
        (components.next(), components.next()),
        (Some(Component::Normal(_)), None)
    );
    assert!(is_beside, "`{name}` was read");
}
