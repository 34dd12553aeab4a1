//! Downloads from a hub in miniature.

mod files;
#[path = "hub/server.rs"]
mod server;

use files::entries;
use retune::model::checkpoint::Checkpoint;
use retune::model::hub::{Access, HubId, HubOptions, PlannedFile, Progress, Token, fetch};
use retune::{Error, ErrorKind, Result};
use server::{Content, Server, State, without_end};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::MutexGuard;
use std::time::Duration;

const FIRST: &str = "1111111111111111111111111111111111111111";
const SECOND: &str = "2222222222222222222222222222222222222222";

/// A hub, and a cache that is filled from it.
struct Hub {
    server: Server,
    cache: tempfile::TempDir,
}

impl Hub {
    /// `org/tiny` with one file of weights at `main`.
    fn new() -> Self {
        let weights = Content::Large(weights(&[("a", 40_000), ("b", 8)]));
        Self::with(BTreeMap::from([
            ("model.safetensors".to_owned(), weights),
            ("pytorch_model.bin".to_owned(), Content::Large(vec![7; 100])),
        ]))
    }

    fn with(mut files: BTreeMap<String, Content>) -> Self {
        for name in [
            "config.json",
            "tokenizer.json",
            "generation_config.json",
            "README.md",
        ] {
            files.insert(
                name.to_owned(),
                Content::Small(format!("{{\"name\": \"{name}\"}}").into_bytes()),
            );
        }
        Self {
            server: Server::start(FIRST, files),
            cache: tempfile::tempdir().expect("a folder"),
        }
    }

    fn sharded() -> Self {
        let index = br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
        Self::with(BTreeMap::from([
            (
                "model-00001-of-00002.safetensors".to_owned(),
                Content::Large(weights(&[("a", 40_000)])),
            ),
            (
                "model-00002-of-00002.safetensors".to_owned(),
                Content::Large(weights(&[("b", 8)])),
            ),
            (
                "model.safetensors.index.json".to_owned(),
                Content::Small(index.to_vec()),
            ),
        ]))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.server.state()
    }

    fn options(&self) -> HubOptions {
        HubOptions {
            endpoint: self.server.endpoint.clone(),
            attempts: 3,
            pause: Duration::from_millis(1),
            timeout: Duration::from_secs(5),
            ..HubOptions::new(self.cache.path())
        }
    }

    fn fetch(&self, id: &str) -> Result<PathBuf> {
        fetch(&HubId::parse(id).expect(id), &self.options(), &mut ())
    }

    fn refused(&self, id: &str) -> (String, String) {
        let error = self.fetch(id).expect_err("must be refused");
        (
            error.to_string(),
            error.hint_text().unwrap_or_default().to_owned(),
        )
    }

    fn repository(&self) -> PathBuf {
        self.cache.path().join("models--org--tiny")
    }

    fn snapshot(&self) -> PathBuf {
        self.repository().join("snapshots").join(FIRST)
    }

    /// Where the weights lie when they are whole; until then the name ends in `.incomplete`.
    fn blob(&self) -> PathBuf {
        let etag = self.of("model.safetensors").etag();
        self.repository().join("blobs").join(etag)
    }

    /// Asserts that the weights in `folder` are the hub's.
    #[track_caller]
    fn delivered(&self, folder: &Path) {
        assert_eq!(
            fs::read(folder.join("model.safetensors")).expect("the file"),
            self.of("model.safetensors").bytes()
        );
    }

    /// The requests so far that transfer content, by their paths, and forgets them.
    fn transfers(&self) -> Vec<String> {
        let requests = std::mem::take(&mut self.state().requests);
        let gets = requests
            .into_iter()
            .filter(|request| request.line.starts_with("GET") && !request.line.contains("/api/"));
        gets.map(|request| request.line).collect()
    }

    fn of(&self, name: &str) -> Content {
        self.state().commits[FIRST][name].clone()
    }
}

/// A safetensors file with f32 tensors of these lengths.
fn weights(tensors: &[(&str, usize)]) -> Vec<u8> {
    let data: Vec<(String, Vec<u8>)> = tensors
        .iter()
        .map(|(name, length)| {
            (
                (*name).to_owned(),
                (0..*length)
                    .flat_map(|i| (i as f32).to_le_bytes())
                    .collect(),
            )
        })
        .collect();
    let views = data.iter().map(|(name, bytes)| {
        let shape = vec![bytes.len() / 4];
        (
            name,
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes)
                .expect("a tensor"),
        )
    });
    safetensors::serialize(views, None).expect("a file")
}

#[derive(Default)]
struct Recorder {
    plan: Vec<PlannedFile>,
    present: BTreeMap<String, u64>,
    finished: Vec<String>,
    notices: Vec<String>,
    stop_at: Option<u64>,
}

impl Progress for Recorder {
    fn begin(&mut self, files: &[PlannedFile]) {
        self.plan = files.to_vec();
    }
    fn advance(&mut self, file: &str, present: u64) {
        self.present.insert(file.to_owned(), present);
    }
    fn finish(&mut self, file: &str) {
        self.finished.push(file.to_owned());
    }
    fn notice(&mut self, text: &str) {
        self.notices.push(text.to_owned());
    }
    fn stop_requested(&self) -> bool {
        self.stop_at.is_some_and(|limit| {
            self.present
                .get("model.safetensors")
                .is_some_and(|present| *present >= limit)
        })
    }
}

fn tiny() -> HubId {
    HubId::parse("org/tiny").expect("an id")
}

#[test]
fn downloads_into_the_layout_of_huggingface_hub() {
    let hub = Hub::new();
    let mut progress = Recorder::default();
    let folder = fetch(&tiny(), &hub.options(), &mut progress).expect("a download");
    assert_eq!(folder, hub.snapshot());
    assert_eq!(
        entries(&folder),
        [
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json"
        ]
    );
    assert_eq!(
        fs::read_to_string(hub.repository().join("refs/main")).expect("the reference"),
        FIRST
    );
    let weights = hub.of("model.safetensors");
    assert_eq!(fs::read(hub.blob()).expect("the blob"), weights.bytes());
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(folder.join("model.safetensors")).expect("a link"),
        Path::new("../../blobs").join(weights.etag())
    );
    assert_eq!(
        Checkpoint::open(&folder)
            .expect("a checkpoint")
            .names()
            .count(),
        2
    );
    assert!(!hub.blob().with_extension("incomplete").exists());

    let sizes: Vec<_> = progress
        .plan
        .iter()
        .map(|file| (file.name.as_str(), file.size, file.present))
        .collect();
    assert_eq!(
        sizes[0],
        (
            "config.json",
            Some(hub.of("config.json").bytes().len() as u64),
            0
        )
    );
    assert_eq!(
        sizes.last(),
        Some(&("model.safetensors", Some(weights.bytes().len() as u64), 0)),
        "weights come last"
    );
    assert_eq!(
        progress.present["model.safetensors"],
        weights.bytes().len() as u64
    );
    assert_eq!(progress.finished.len(), 4);
    assert_eq!(
        hub.transfers()
            .iter()
            .filter(|line| line.contains("pytorch_model.bin"))
            .count(),
        0
    );

    // What is there is not asked for again.
    assert_eq!(hub.fetch("org/tiny").expect("again"), folder);
    assert_eq!(hub.state().requests.len(), 1);
    let mut again = Recorder::default();
    fetch(&tiny(), &hub.options(), &mut again).expect("again");
    assert!(
        again
            .plan
            .iter()
            .all(|file| file.size == Some(file.present))
    );
}

#[test]
fn downloads_all_shards_of_an_index() {
    let hub = Hub::sharded();
    let folder = hub.fetch("org/tiny").expect("a download");
    let checkpoint = Checkpoint::open(&folder).expect("a checkpoint");
    assert_eq!(
        checkpoint
            .shards()
            .map(|(file, _)| file.to_owned())
            .collect::<Vec<_>>()
            .len(),
        2
    );

    fs::remove_file(folder.join("model-00002-of-00002.safetensors")).expect("removed");
    let mut offline = hub.options();
    offline.access = Access::Offline;
    let missing = fetch(&tiny(), &offline, &mut ())
        .expect_err("incomplete")
        .to_string();
    assert!(
        missing.contains("`model-00002-of-00002.safetensors`") && !missing.contains("00001"),
        "{missing}"
    );
}

/// The ranges that the storage was asked for.
fn ranges(hub: &Hub) -> Vec<Option<String>> {
    hub.state()
        .requests
        .iter()
        .filter(|request| request.to_storage)
        .map(|request| request.range.clone())
        .collect()
}

#[test]
fn a_broken_download_is_continued_by_the_next_one() {
    let hub = Hub::new();
    hub.state().cuts = vec![70_000];
    let mut once = hub.options();
    once.attempts = 1;
    let error = fetch(&tiny(), &once, &mut ()).expect_err("cut off");
    assert!(
        error
            .hint_text()
            .expect("a hint")
            .contains("continue at byte 70000"),
        "{error:?}"
    );
    let partial = hub.blob().with_extension("incomplete");
    assert_eq!(fs::metadata(&partial).expect("the part").len(), 70_000);
    assert!(
        !hub.repository().join("refs/main").exists(),
        "a broken download is no version of the model"
    );

    hub.state().requests.clear();
    let mut progress = Recorder::default();
    let folder = fetch(&tiny(), &once, &mut progress).expect("the rest");
    assert_eq!(ranges(&hub), [Some("bytes=70000-".to_owned())]);
    assert_eq!(progress.plan.last().map(|file| file.present), Some(70_000));
    hub.delivered(&folder);
    assert!(!partial.exists());
}

#[test]
fn a_broken_download_goes_on_by_itself() {
    let hub = Hub::new();
    // Five breaks are more than three attempts, but each brings something.
    hub.state().cuts = vec![20_000, 10_000, 30_000, 1, 50_000];
    let mut progress = Recorder::default();
    let folder = fetch(&tiny(), &hub.options(), &mut progress).expect("a download");
    let expected = [
        None,
        Some(50_000),
        Some(50_001),
        Some(80_001),
        Some(90_001),
        Some(110_001),
    ];
    assert_eq!(
        ranges(&hub),
        expected.map(|start| start.map(|start| format!("bytes={start}-")))
    );
    assert_eq!(progress.notices.len(), 5);
    hub.delivered(&folder);
}

#[test]
fn a_connection_that_brings_nothing_is_given_up() {
    let hub = Hub::new();
    hub.state().cuts = vec![0; 10];
    let (_, hint) = hub.refused("org/tiny");
    assert!(hint.contains("continue at byte 0"), "{hint}");
    assert_eq!(ranges(&hub).len(), 3);
}

#[test]
fn a_stopped_download_is_continued() {
    let hub = Hub::new();
    let mut progress = Recorder {
        stop_at: Some(1),
        ..Recorder::default()
    };
    let error = fetch(&tiny(), &hub.options(), &mut progress).expect_err("stopped");
    assert_eq!(error.kind(), ErrorKind::Interrupted);
    let present = progress.present["model.safetensors"];
    hub.state().requests.clear();
    hub.fetch("org/tiny").expect("the rest");
    match present == hub.of("model.safetensors").bytes().len() as u64 {
        true => assert!(ranges(&hub).is_empty()),
        false => assert_eq!(ranges(&hub), [Some(format!("bytes={present}-"))]),
    }
}

#[test]
fn a_server_without_ranges_sends_all_again() {
    let hub = Hub::new();
    hub.state().cuts = vec![5_000];
    hub.state().ignores_ranges = true;
    let folder = hub.fetch("org/tiny").expect("a download");
    hub.delivered(&folder);
}

#[test]
fn damage_is_found() {
    let hub = Hub::new();
    hub.state().damages = true;
    let (text, _) = hub.refused("org/tiny");
    assert!(
        text.contains("model.safetensors") && text.contains("SHA-256"),
        "{text}"
    );
    let blob = hub.blob();
    assert!(!blob.exists() && !hub.snapshot().join("model.safetensors").exists());

    // Rubbish left by another program is dropped, and the file is transferred from its first byte.
    hub.state().damages = false;
    let length = hub.of("model.safetensors").bytes().len();
    for rubbish in [vec![0; 100], vec![0; length], vec![0; length + 1]] {
        fs::write(blob.with_extension("incomplete"), rubbish).expect("written");
        let folder = hub.fetch("org/tiny").expect("a download");
        hub.delivered(&folder);
        fs::remove_file(&blob).expect("removed");
    }
}

#[test]
fn the_token_goes_to_the_hub_only() {
    let hub = Hub::new();
    let mut options = hub.options();
    options.token = Some(Token::new("hf_secret").expect("a token"));
    fetch(&tiny(), &options, &mut ()).expect("a download");
    let state = hub.state();
    assert!(state.requests.iter().any(|request| request.to_storage));
    for request in &state.requests {
        let expected = (!request.to_storage).then_some("Bearer hf_secret");
        assert_eq!(request.token.as_deref(), expected, "{}", request.line);
    }
    assert!(!format!("{options:?}").contains("secret"));
}

#[test]
fn offline_uses_the_cache_and_says_what_is_missing() {
    let hub = Hub::new();
    let offline = HubOptions {
        access: Access::Offline,
        ..hub.options()
    };
    let error = fetch(&tiny(), &offline, &mut ()).expect_err("nothing there");
    assert!(
        error.to_string().contains("`org/tiny` is not in the cache"),
        "{error}"
    );
    assert!(
        error
            .hint_text()
            .expect("a hint")
            .contains("HF_HUB_OFFLINE")
    );
    assert!(hub.state().requests.is_empty());

    let folder = hub.fetch("org/tiny").expect("a download");
    hub.state().requests.clear();
    assert_eq!(fetch(&tiny(), &offline, &mut ()).expect("cached"), folder);
    let pinned = HubId::parse(&format!("org/tiny@{FIRST}")).expect("an id");
    assert_eq!(fetch(&pinned, &offline, &mut ()).expect("cached"), folder);
    let other = HubId::parse("org/tiny@v2").expect("an id");
    assert!(
        fetch(&other, &offline, &mut ())
            .expect_err("not cached")
            .to_string()
            .contains("org/tiny@v2")
    );
    fs::remove_file(folder.join("config.json")).expect("removed");
    fs::remove_file(folder.join("model.safetensors")).expect("removed");
    let text = fetch(&tiny(), &offline, &mut ())
        .expect_err("incomplete")
        .to_string();
    assert!(
        text.contains("`config.json`, `model.safetensors`"),
        "{text}"
    );
    assert!(hub.state().requests.is_empty());
}

#[test]
fn without_a_network_the_cache_will_do() {
    let hub = Hub::new();
    let unreachable = HubOptions {
        endpoint: "http://127.0.0.1:1".to_owned(),
        ..hub.options()
    };
    let error = fetch(&tiny(), &unreachable, &mut ()).expect_err("no hub");
    assert!(error.to_string().contains("http://127.0.0.1:1"), "{error}");
    assert!(error.hint_text().expect("a hint").contains("HF_ENDPOINT"));
    let folder = hub.fetch("org/tiny").expect("a download");
    let mut progress = Recorder::default();
    assert_eq!(
        fetch(&tiny(), &unreachable, &mut progress).expect("cached"),
        folder
    );
    assert_eq!(progress.notices.len(), 1);
}

#[test]
fn refusals_say_what_to_do() {
    let hub = Hub::new();
    let with_token = HubOptions {
        token: Some(Token::new("hf_x").expect("a token")),
        ..hub.options()
    };
    let ask = |refusal: &str, options: &HubOptions| {
        hub.state().refusal = Some(refusal.to_owned());
        let error = fetch(&tiny(), options, &mut ()).expect_err("refused");
        (
            error.to_string(),
            error.hint_text().expect("a hint").to_owned(),
        )
    };
    let anonymous = hub.options();
    let (text, hint) = ask(
        "401 Unauthorized\r\nX-Error-Code: GatedRepo\r\n",
        &anonymous,
    );
    assert!(
        text.contains("gated") && hint.contains("HF_TOKEN") && hint.contains("/org/tiny"),
        "{text} {hint}"
    );
    let (text, hint) = ask("403 Forbidden\r\nX-Error-Code: GatedRepo\r\n", &with_token);
    assert!(
        text.contains("this token has no access") && hint.contains("ask for access"),
        "{text} {hint}"
    );
    let (text, hint) = ask(
        "401 Unauthorized\r\nX-Error-Code: RepoNotFound\r\n",
        &anonymous,
    );
    assert!(
        text.contains("no public model `org/tiny`") && hint.contains("spelling"),
        "{text} {hint}"
    );
    let (text, _) = ask("401 Unauthorized\r\n", &with_token);
    assert!(text.contains("does not accept the token"), "{text}");
    let (text, hint) = ask(
        "404 Not Found\r\nX-Error-Code: RepoNotFound\r\n",
        &with_token,
    );
    assert!(
        text.contains("no model `org/tiny`") && hint.contains("spelling"),
        "{text} {hint}"
    );
    let asked = hub.state().requests.len();
    let (text, _) = ask("503 Service Unavailable\r\n", &anonymous);
    assert!(text.contains("503"), "{text}");
    assert_eq!(
        hub.state().requests.len(),
        asked + 3,
        "what may pass is tried again"
    );
    hub.state().refusal = None;
    let (text, hint) = hub.refused("org/tiny@v9");
    assert!(
        text.contains("no revision `v9`") && hint.contains("/tree/main"),
        "{text} {hint}"
    );
    let (text, _) = hub.refused("org/none");
    assert!(text.contains("no model `org/none`"), "{text}");
}

#[test]
fn revisions_are_pinned_and_share_what_they_have_in_common() {
    let hub = Hub::new();
    let first = hub.fetch("org/tiny").expect("the first");
    {
        let mut state = hub.state();
        let mut files = state.commits[FIRST].clone();
        files.insert(
            "config.json".to_owned(),
            Content::Small(b"{\"name\": \"newer\"}".to_vec()),
        );
        state.commits.insert(SECOND.to_owned(), files);
        state
            .references
            .insert("main".to_owned(), SECOND.to_owned());
        state.references.insert("v1".to_owned(), FIRST.to_owned());
        state
            .references
            .insert("refs/pr/1".to_owned(), SECOND.to_owned());
    }
    hub.transfers();
    let second = hub.fetch("org/tiny").expect("the second");
    assert!(second.ends_with(SECOND));
    assert_eq!(hub.transfers().len(), 1, "only config.json is new");
    assert_eq!(
        fs::read_to_string(second.join("config.json")).expect("the file"),
        "{\"name\": \"newer\"}"
    );
    assert_ne!(
        fs::read(first.join("config.json")).expect("kept"),
        fs::read(second.join("config.json")).expect("new")
    );
    assert_eq!(hub.fetch("org/tiny@v1").expect("by tag"), first);
    assert_eq!(
        hub.fetch(&format!("org/tiny@{FIRST}")).expect("by commit"),
        first
    );
    assert_eq!(
        hub.fetch("org/tiny@refs/pr/1").expect("by pull request"),
        second
    );
    let reference =
        |name: &str| fs::read_to_string(hub.repository().join("refs").join(name)).expect(name);
    assert_eq!(
        [reference("main"), reference("v1"), reference("refs/pr/1")],
        [SECOND, FIRST, SECOND]
    );
    assert!(!hub.repository().join("refs").join(FIRST).exists());
}

#[test]
fn nothing_is_written_outside_of_the_cache() {
    let outside = |hub: &Hub| {
        let mut names = entries(hub.cache.path());
        names.retain(|name| name != ".locks" && name != "models--org--tiny");
        names
    };
    for name in [
        "../../../evil.json",
        "/etc/evil.json",
        "a/../../evil.json",
        "..",
    ] {
        let hub = Hub::new();
        hub.state().extra_siblings = vec![name.to_owned()];
        let (text, _) = hub.refused("org/tiny");
        assert!(
            text.contains("outside of itself") && text.contains(name),
            "{text}"
        );
        assert!(outside(&hub).is_empty());
    }
    let hub = Hub::new();
    hub.state().etag = Some("../../../../evil".to_owned());
    assert!(hub.refused("org/tiny").0.contains("ETag"));
    let hub = Hub::new();
    hub.state().commit = Some("../../evil".to_owned());
    assert!(hub.refused("org/tiny").0.contains("commit"));
    let hub = Hub::sharded();
    let index = br#"{"weight_map": {"a": "../../evil.safetensors"}}"#;
    if let Some(files) = hub.state().commits.get_mut(FIRST) {
        files.insert(
            "model.safetensors.index.json".to_owned(),
            Content::Small(index.to_vec()),
        );
    }
    assert!(hub.refused("org/tiny").0.contains("plain names"));
    assert!(outside(&hub).is_empty());
}

#[test]
fn pickles_are_refused_before_anything_is_downloaded() {
    let hub = Hub::with(BTreeMap::from([(
        "pytorch_model.bin".to_owned(),
        Content::Large(vec![7; 100]),
    )]));
    let (text, hint) = hub.refused("org/tiny");
    assert!(
        text.contains("pickles")
            && text.contains("`pytorch_model.bin`")
            && hint.contains("save_pretrained"),
        "{text} {hint}"
    );
    assert!(hub.transfers().is_empty());
    let hub = Hub::with(BTreeMap::new());
    assert!(
        hub.refused("org/tiny")
            .0
            .contains("neither `model.safetensors`")
    );
    let hub = Hub::sharded();
    if let Some(files) = hub.state().commits.get_mut(FIRST) {
        files.remove("model-00001-of-00002.safetensors");
    }
    assert!(
        hub.refused("org/tiny")
            .0
            .contains("`model-00001-of-00002.safetensors`")
    );
}

#[test]
fn two_downloads_at_once_transfer_each_file_once() {
    let hub = Hub::new();
    let results: Vec<Result<PathBuf>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| hub.fetch("org/tiny")))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    for result in results {
        assert!(
            result
                .expect("a download")
                .join("model.safetensors")
                .is_file()
        );
    }
    assert_eq!(
        hub.transfers()
            .iter()
            .filter(|line| line.contains("/blobs/"))
            .count(),
        1
    );
}

#[test]
fn senseless_answers_are_errors() {
    let json = |body: &str| {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    };
    for garbage in [
        Vec::new(),
        b"\0\0\0".to_vec(),
        b"HTTP/1.1 999 What\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{".to_vec(),
        b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n".to_vec(),
        b"HTTP/1.1 302 Found\r\nLocation: ftp://x/y\r\nContent-Length: 0\r\n\r\n".to_vec(),
        b"HTTP/1.1 302 Found\r\nLocation: \xff\r\nContent-Length: 0\r\n\r\n".to_vec(),
        json("<html>please log in</html>"),
        json("{}"),
        json(r#"{"sha": "main", "siblings": []}"#),
        json(&format!(r#"{{"sha": "{FIRST}", "siblings": []}}"#)),
        json(&format!(
            r#"{{"sha": "{FIRST}", "siblings": [{{"rfilename": 1}}]}}"#
        )),
    ] {
        let hub = Hub::new();
        hub.state().answers = vec![garbage.clone(); 5];
        let error: Error = hub.fetch("org/tiny").expect_err("senseless");
        assert!(
            error.hint_text().is_some(),
            "{}: {error}",
            String::from_utf8_lossy(&garbage)
        );
    }
}

#[test]
fn answers_without_end_and_listings_of_millions_are_cut_off() {
    let hub = Hub::new();
    let started = std::time::Instant::now();
    const BLANK: &[u8] = &[b' '; 1 << 16];
    for head in [
        "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 9999999999999\r\n\r\n",
    ] {
        let options = HubOptions {
            endpoint: without_end(head, BLANK),
            ..hub.options()
        };
        let error = fetch(&tiny(), &options, &mut ()).expect_err("without end");
        assert!(
            error.to_string().contains("more files than any model"),
            "{error}"
        );
    }
    hub.state().extra_siblings = (0..200_000).map(|index| format!("{index}")).collect();
    let (fact, hint) = hub.refused("org/tiny");
    assert!(fact.contains("more files than any model"), "{fact}");
    assert!(!hint.is_empty());
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn redirects_lead_to_the_web_and_come_to_an_end() {
    let redirect = |to: &str| {
        format!(
            "HTTP/1.1 302 Found\r\nLocation: {to}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        .into_bytes()
    };
    for (to, named) in [
        ("/again", "redirects in a circle"),
        ("file:///etc/passwd", "is not a web address"),
        ("data:text/plain,hello", "is not a web address"),
    ] {
        let hub = Hub::new();
        hub.state().answers = vec![redirect(to); 40];
        let (fact, hint) = hub.refused("org/tiny");
        assert!(fact.contains(named), "{to}: {fact}");
        assert!(!hint.is_empty(), "{to}: {fact}");
    }
}

#[test]
fn content_of_another_range_or_encoding_is_not_taken() {
    let hub = Hub::new();
    hub.state().cuts = vec![1000];
    hub.state().shifts = true;
    let (fact, _) = hub.refused("org/tiny");
    assert!(
        fact.contains("asked for the file from byte 1000 on") && fact.contains("bytes 1001-"),
        "{fact}"
    );

    let hub = Hub::new();
    hub.state().encodes = true;
    let (fact, hint) = hub.refused("org/tiny");
    assert!(
        fact.contains("encoded") && hint.contains("HF_ENDPOINT"),
        "{fact}"
    );
    assert!(!hub.snapshot().join("model.safetensors").exists());
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let hub = Hub::new();
    let file = hub.cache.path().join("file");
    fs::write(&file, "").expect("written");
    let options = HubOptions {
        cache: file.clone(),
        ..hub.options()
    };
    let error = fetch(&tiny(), &options, &mut ()).expect_err("no folder");
    assert!(
        error.to_string().contains(&file.display().to_string()),
        "{error}"
    );
}
