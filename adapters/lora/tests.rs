//! LoRA: what can be asked for, where it acts, what it computes and how a folder says it.

use super::*;
use crate::ErrorKind;
use crate::hooks::tests::Frozen;
use candle_core::{DType, Device};
use std::collections::BTreeMap;

/// The layers of two blocks.
fn paths() -> Vec<String> {
    let mut paths = vec!["model.embed_tokens".to_owned()];
    for layer in 0..2 {
        for name in ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"] {
            paths.push(format!("model.layers.{layer}.{name}"));
        }
    }
    paths.push("lm_head".to_owned());
    paths
}

fn on(targets: &str) -> Lora {
    Lora {
        targets: targets.parse().expect("targets"),
        ..Lora::default()
    }
}

fn model() -> ModelShape {
    ModelShape {
        hidden_size: 2,
        layers: 2,
        vocabulary: 3,
        head_path: "lm_head",
        ..ModelShape::default()
    }
}

fn tied() -> ModelShape {
    ModelShape {
        tied_head: true,
        ..model()
    }
}

/// What the method answers at a linear layer.
fn at(
    lora: &Lora,
    path: &str,
    base: &Frozen,
    weights: &mut AdapterWeights,
) -> Result<Option<Box<dyn LinearAdapter>>> {
    let site = LinearSite {
        path,
        base,
        model: &model(),
    };
    lora.adapt_linear(&site, weights)
}

fn fresh() -> AdapterWeights {
    AdapterWeights::fresh(1, &Device::Cpu)
}

fn tensor<const ROWS: usize, const COLUMNS: usize>(
    values: [[f32; COLUMNS]; ROWS],
) -> Result<Tensor> {
    Ok(Tensor::new(&values, &Device::Cpu)?)
}

/// A configuration as PEFT writes it, as far as it must say something.
fn config() -> PeftConfig {
    PeftConfig::new("LORA")
        .with("r", 4)
        .with("target_modules", json!(["q_proj"]))
}

fn overrides_of(texts: &[&str]) -> Vec<Override> {
    texts
        .iter()
        .map(|text| text.parse().expect("NAME=NUMBER"))
        .collect()
}

#[test]
fn an_alpha_is_a_finite_number_above_zero() {
    let mut wrong: Vec<Lora> = [0.0, -0.0, -4.0, 1e39, f64::INFINITY, f64::NAN]
        .into_iter()
        .map(|alpha| Lora {
            alpha: Some(alpha),
            ..Lora::default()
        })
        .collect();
    for alpha in [
        "q_proj=0",
        "q_proj=-4",
        "q_proj=1e39",
        "q_proj=inf",
        "q_proj=nan",
    ] {
        wrong.push(Lora {
            alpha_pattern: vec![alpha.parse().expect("a number")],
            ..Lora::default()
        });
    }
    for lora in wrong {
        let error = lora
            .validated()
            .and_then(Lora::with_positive_alphas)
            .expect_err("a wrong alpha");
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        assert!(error.to_string().contains("an alpha must be"), "{error}");
    }
    let fine = Lora {
        alpha: Some(0.5),
        ..Lora::default()
    };
    assert!(
        fine.validated()
            .and_then(Lora::with_positive_alphas)
            .is_ok()
    );
}

#[test]
fn a_folder_of_others_may_hold_any_finite_alpha() -> Result<()> {
    for alpha in [0.0, -4.0, -3e38] {
        let mut config = PeftConfig::new("LORA")
            .with("r", 4)
            .with("lora_alpha", alpha)
            .with("target_modules", json!(["q_proj"]));
        assert_eq!(Lora::from_peft(&mut config)?.alpha, Some(alpha));
    }
    Ok(())
}

#[test]
fn a_target_that_the_layers_leave_out_is_named() {
    let lora = |targets| Lora {
        layers: Some(LayerSelection::new(vec![1])),
        ..on(targets)
    };
    for (targets, dropped) in [
        ("q_proj,embed_tokens", "`embed_tokens`"),
        (
            "layers.0.self_attn.q_proj,k_proj,lm_head",
            "`layers.0.self_attn.q_proj`, `lm_head`",
        ),
    ] {
        let lora = lora(targets);
        assert!(lora.unmatched(&paths()).is_empty());
        let error = lora.check_paths(&paths()).expect_err(targets);
        assert_eq!(
            error.to_string(),
            format!("`--layers 1` leaves nothing of {dropped} among the targets")
        );
    }
    for targets in ["all-linear", "q_proj,k_proj"] {
        assert!(lora(targets).check_paths(&paths()).is_ok(), "{targets}");
    }
    assert!(on("q_proj,embed_tokens").check_paths(&paths()).is_ok());
}

#[test]
fn a_pattern_beside_the_targets_is_named() {
    let lora = |targets, pattern: &str| Lora {
        rank_pattern: vec![pattern.parse().expect("a pattern")],
        ..on(targets)
    };
    let beside = lora("q_proj", "k_proj=3");
    assert!(beside.unmatched(&paths()).is_empty());
    let error = beside
        .check_paths(&paths())
        .expect_err("k_proj is no target");
    assert_eq!(
        error.to_string(),
        "`k_proj` of `--rank-pattern` matches none of the adapted layers"
    );
    assert_eq!(error.hint_text(), Some("adapted are `q_proj`"));
    // The embedding is not linear, and the head is left alone.
    for pattern in ["embed_tokens=3", "lm_head=3"] {
        assert!(lora("all-linear", pattern).check_paths(&paths()).is_err());
    }
    assert!(lora("q_proj", "q_proj=3").check_paths(&paths()).is_ok());
    assert_eq!(lora("q_proj", "k_prj=3").unmatched(&paths()), ["k_prj"]);
}

#[test]
fn a_pattern_that_never_counts_is_named() {
    let lora = |patterns: &[&str]| Lora {
        rank_pattern: overrides_of(patterns),
        ..on("q_proj,k_proj")
    };
    let shadowed: [(&[&str], &str); 4] = [
        (&["q_proj=3", "q_proj=400"], "`q_proj=400`"),
        (&["q_proj=2", " q_proj =4"], "`q_proj=4`"),
        (
            &["q_proj=3", "layers.0.self_attn.q_proj=5"],
            "`layers.0.self_attn.q_proj=5`",
        ),
        // The two before it have taken all that it matches.
        (&["q_proj=3", "k_proj=3", "._proj=5"], "`._proj=5`"),
    ];
    for (patterns, never) in shadowed {
        let lora = lora(patterns);
        assert!(lora.unmatched(&paths()).is_empty());
        let error = lora.check_paths(&paths()).expect_err(never);
        let fact = format!("{never} of `--rank-pattern` never counts");
        assert!(error.to_string().starts_with(&fact), "{error}");
        assert!(error.hint_text().is_some());
        let alphas = Lora {
            rank_pattern: Vec::new(),
            alpha_pattern: lora.rank_pattern,
            ..on("q_proj,k_proj")
        };
        let error = alphas.check_paths(&paths()).expect_err(never);
        assert!(error.to_string().contains("`--alpha-pattern`"), "{error}");
    }
    let counting: [&[&str]; 3] = [
        &["layers.0.self_attn.q_proj=5", "q_proj=3"],
        &["q_proj=3", "._proj=5"],
        &["q_proj=3", "k_proj=3"],
    ];
    for fine in counting {
        assert!(lora(fine).check_paths(&paths()).is_ok(), "{fine:?}");
    }
}

#[test]
fn rank_and_scale_of_every_layer_are_kept_in_a_folder() -> Result<()> {
    let kept = |lora: Lora| -> Result<()> {
        let written = lora.peft_config(&model(), &fresh())?;
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join(CONFIG_FILE), written.to_json()?).expect("written");
        let read = Lora::from_peft(&mut PeftConfig::read(folder.path())?)?;
        for path in paths() {
            assert_eq!(read.rank_at(&path), lora.rank_at(&path), "{path}: {lora:?}");
            assert_eq!(
                read.scale_at(&path),
                lora.scale_at(&path),
                "{path}: {lora:?}"
            );
        }
        Ok(())
    };
    let lists: [&[&str]; 5] = [
        &[],
        &["q_proj=9", "layers.0.self_attn.q_proj=3"],
        &["layers.0.self_attn.q_proj=9", "q_proj=3", ".*=1"],
        &["._proj=9", "k_proj=3"],
        &["q_proj=3", "k_proj=5", "q_proj=400"],
    ];
    for patterns in lists {
        for rslora in [false, true] {
            for (rank_pattern, alpha_pattern) in [
                (overrides_of(patterns), Vec::new()),
                (Vec::new(), overrides_of(patterns)),
                (overrides_of(patterns), overrides_of(&["k_proj=0.1"])),
            ] {
                for alpha in [None, Some(0.3)] {
                    kept(Lora {
                        rank: 4,
                        alpha,
                        rslora,
                        rank_pattern: rank_pattern.clone(),
                        alpha_pattern: alpha_pattern.clone(),
                        ..Lora::default()
                    })?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_rank_is_a_whole_number_that_a_layer_can_have() {
    let lora = |rank, patterns: &[&str]| Lora {
        rank,
        rank_pattern: overrides_of(patterns),
        ..Lora::default()
    };
    for fine in [lora(1, &["q_proj=65536"]), lora(65_536, &["q_proj=1"])] {
        assert!(fine.validated().is_ok());
    }
    for wrong in [
        lora(0, &[]),
        lora(65_537, &[]),
        lora(8, &["q_proj=4", "k_proj=0"]),
        lora(8, &["q_proj=2.5"]),
        lora(8, &["q_proj=nan"]),
    ] {
        let error = wrong.validated().expect_err("no such rank");
        assert_eq!(error.kind(), ErrorKind::Usage);
        let fact = "a rank must be a whole number from 1 to 65536, not";
        assert!(error.to_string().starts_with(fact), "{error}");
    }
}

#[test]
fn dropout_leaves_something() {
    let lora = |dropout| Lora {
        dropout,
        ..Lora::default()
    };
    for fine in [0.0, 0.99] {
        assert!(lora(fine).validated().is_ok(), "{fine}");
    }
    for wrong in [-0.1, 1.0, f64::NAN] {
        let error = lora(wrong).validated().expect_err("nothing is left");
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}

#[test]
fn blocks_are_chosen_among_names_and_not_in_a_pattern() {
    let layers = Some(LayerSelection::new(vec![1]));
    let names = Lora {
        layers: layers.clone(),
        ..on("q_proj")
    };
    assert!(names.validated().is_ok());
    assert!(on(".*q_proj").validated().is_ok());
    let pattern = Lora {
        layers,
        ..on(".*q_proj")
    };
    let error = pattern.validated().expect_err("blocks of a pattern");
    assert_eq!(error.kind(), ErrorKind::Usage);

    let read = |mut config: PeftConfig| Lora::from_peft(&mut config);
    let blocks = || config().with("layers_to_transform", 1);
    assert!(read(blocks()).is_ok());
    assert!(read(config().with("target_modules", ".*q_proj")).is_ok());
    let error = read(blocks().with("target_modules", ".*q_proj")).expect_err("blocks of a pattern");
    assert_eq!(error.kind(), ErrorKind::Failed);
}

#[test]
fn the_blocks_are_the_models() {
    let lora = |layers| Lora {
        layers: Some(LayerSelection::new(layers)),
        ..Lora::default()
    };
    assert!(lora(vec![0, 1]).check(&model()).is_ok());
    let error = lora(vec![1, 2]).check(&model()).expect_err("two blocks");
    assert_eq!(
        error.to_string(),
        "`--layers` names block 2, the model has blocks 0 to 1"
    );
}

#[test]
fn a_layer_is_adapted_if_it_is_a_target_in_a_chosen_block_and_not_excluded() -> Result<()> {
    let base = Frozen(Tensor::ones((3, 2), DType::F32, &Device::Cpu)?);
    let adapted = |lora: Lora| -> Result<Vec<String>> {
        let mut adapted = Vec::new();
        for path in &paths()[1..] {
            if at(&lora, path, &base, &mut fresh())?.is_some() {
                adapted.push(path.trim_start_matches("model.layers.").to_owned());
            }
        }
        Ok(adapted)
    };
    let queries = ["0.self_attn.q_proj", "1.self_attn.q_proj"];
    assert_eq!(adapted(on("q_proj"))?, queries);
    assert_eq!(adapted(on("q_proj,lm_head"))?[2..], ["lm_head"]);
    assert_eq!(adapted(Lora::default())?.len(), 6, "all but the head");
    let in_a_block = Lora {
        layers: Some(LayerSelection::new(vec![1])),
        ..on("q_proj,lm_head")
    };
    assert_eq!(adapted(in_a_block)?, queries[1..]);
    let excluding = Lora {
        exclude: Some("layers.0.self_attn.q_proj,lm_head".parse()?),
        ..on("q_proj,lm_head")
    };
    assert_eq!(adapted(excluding)?, queries[1..]);
    Ok(())
}

#[test]
fn a_head_that_is_the_embedding_is_not_adapted_alone() -> Result<()> {
    let base = Frozen(Tensor::ones((3, 2), DType::F32, &Device::Cpu)?);
    let tied = tied();
    let site = |path| LinearSite {
        path,
        base: &base,
        model: &tied,
    };
    let lora = on("q_proj,lm_head");
    let beside = site("model.layers.0.self_attn.q_proj");
    assert!(lora.adapt_linear(&beside, &mut fresh())?.is_some());
    assert!(lora.adapt_linear(&site("lm_head"), &mut fresh()).is_err());
    Ok(())
}

#[test]
fn rank_and_alpha_are_those_of_the_first_pattern_that_matches() -> Result<()> {
    let base = Frozen(Tensor::ones((3, 2), DType::F32, &Device::Cpu)?);
    let lora = |rslora| Lora {
        rank: 4,
        rslora,
        rank_pattern: overrides_of(&["layers.0.self_attn.q_proj=9", "q_proj=1"]),
        alpha_pattern: overrides_of(&["k_proj=3"]),
        ..Lora::default()
    };
    // Without an alpha it is twice the rank of all layers.
    for (path, rank, scale, stabilised) in [
        ("model.layers.0.mlp.up_proj", 4, 8.0 / 4.0, 8.0 / 2.0),
        ("model.layers.0.self_attn.q_proj", 9, 8.0 / 9.0, 8.0 / 3.0),
        ("model.layers.1.self_attn.q_proj", 1, 8.0, 8.0),
        ("model.layers.0.self_attn.k_proj", 4, 3.0 / 4.0, 3.0 / 2.0),
        ("model.layers.0.self_attn.qk_proj", 4, 8.0 / 4.0, 8.0 / 2.0),
    ] {
        for (lora, scale) in [(lora(false), scale), (lora(true), stabilised)] {
            let adapter = at(&lora, path, &base, &mut fresh())?.expect("a target");
            let update = adapter.low_rank(Mode::Infer).expect("a product");
            assert_eq!(update.a.dims(), [rank, 2], "{path}");
            assert_eq!(update.b.dims(), [3, rank], "{path}");
            assert_eq!(update.scale, scale, "{path}");
        }
    }
    let given = Lora {
        alpha: Some(5.0),
        ..lora(false)
    };
    let adapter = at(&given, "model.layers.0.mlp.up_proj", &base, &mut fresh())?;
    let adapter = adapter.expect("a target");
    let update = adapter.low_rank(Mode::Infer).expect("a product");
    assert_eq!(update.scale, 5.0 / 4.0);
    Ok(())
}

#[test]
fn a_new_update_is_nothing_and_starts_by_the_number_of_its_inputs() -> Result<()> {
    let base = Frozen(Tensor::ones((3, 64), DType::F32, &Device::Cpu)?);
    let adapter = at(&on("q_proj"), "q_proj", &base, &mut fresh())?.expect("a target");
    let update = adapter.low_rank(Mode::Infer).expect("a product");
    let largest =
        |tensor: &Tensor| -> Result<f32> { Ok(tensor.abs()?.flatten_all()?.max(0)?.to_scalar()?) };
    assert_eq!(largest(update.b)?, 0.0);
    let largest = largest(update.a)?;
    // Uniform below 1 / √64.
    assert!((0.12..=0.125).contains(&largest), "{largest}");
    Ok(())
}

#[test]
fn an_adapted_layer_is_the_frozen_one_and_the_scaled_update() -> Result<()> {
    let path = "model.layers.0.mlp.up_proj";
    let base = Frozen(tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])?);
    let file = BTreeMap::from([
        (
            format!("base_model.model.{path}.lora_A.weight"),
            tensor([[1.0, 1.0]])?,
        ),
        (
            format!("base_model.model.{path}.lora_B.weight"),
            tensor([[1.0], [2.0], [3.0]])?,
        ),
    ]);
    let mut weights = AdapterWeights::loaded(file, &Device::Cpu);
    let lora = Lora {
        rank: 1,
        ..Lora::default()
    };
    let adapter = at(&lora, path, &base, &mut weights)?.expect("a target");
    weights.finish()?;
    let y = adapter.forward(&tensor([[1.0, 2.0]])?, &base, Mode::Infer)?;
    assert_eq!(y.to_vec2::<f32>()?, [[7.0, 14.0, 21.0]]);
    assert_eq!(
        adapter.merged_weight(&base.0)?.to_vec2::<f32>()?,
        [[3.0, 2.0], [4.0, 5.0], [7.0, 7.0]]
    );
    Ok(())
}

#[test]
fn only_the_updates_input_is_dropped_and_only_in_training() -> Result<()> {
    const WIDTH: usize = 8;
    let train = Mode::Train {
        seed: 3,
        first_row: 5,
    };
    let one = Tensor::eye(WIDTH, DType::F32, &Device::Cpu)?;
    let base = Frozen(one.clone());
    let path = "model.layers.0.mlp.up_proj";
    let file = || {
        let named = |part| format!("base_model.model.{path}.{part}.weight");
        BTreeMap::from(["lora_A", "lora_B"].map(|part| (named(part), one.clone())))
    };
    let adapter = |dropout| -> Result<Box<dyn LinearAdapter>> {
        let lora = Lora {
            rank: WIDTH,
            alpha: Some(WIDTH as f64),
            dropout,
            ..Lora::default()
        };
        let mut weights = AdapterWeights::loaded(file(), &Device::Cpu);
        Ok(at(&lora, path, &base, &mut weights)?.expect("a target"))
    };
    let x = Tensor::full(2f32, (16, WIDTH), &Device::Cpu)?;
    let forward = |adapter: &dyn LinearAdapter, mode| -> Result<Vec<Vec<f32>>> {
        Ok(adapter.forward(&x, &base, mode)?.to_vec2()?)
    };
    let whole = vec![vec![4.0; WIDTH]; 16];

    let without = adapter(0.0)?;
    assert_eq!(forward(without.as_ref(), train)?, whole);
    let update = without.low_rank(train).expect("a product");
    assert_eq!(update.dropout, None);

    let with = adapter(0.5)?;
    assert_eq!(forward(with.as_ref(), Mode::Infer)?, whole);
    let update = with.low_rank(Mode::Infer).expect("a product");
    assert_eq!(update.dropout, None);

    let update = with.low_rank(train).expect("a product");
    let dropout = update.dropout.expect("dropout in training");
    assert_eq!(dropout, Dropout::new(0.5, 3, path, 5));
    let mut expected = vec![vec![2.0; WIDTH]; 16];
    for (row, values) in expected.iter_mut().enumerate() {
        dropout.apply(row, values);
        values.iter_mut().for_each(|value| *value += 2.0);
    }
    assert_eq!(forward(with.as_ref(), train)?, expected);
    // Half of the update's inputs are zero, and the others are twice what they were.
    let kept = expected.iter().flatten().filter(|value| **value == 6.0);
    assert!((16 * WIDTH / 4..16 * WIDTH * 3 / 4).contains(&kept.count()));
    Ok(())
}

#[test]
fn an_embedding_is_adapted_if_it_is_named() -> Result<()> {
    let path = "model.embed_tokens";
    let model = &model();
    let zeros = || -> Result<Tensor> { Ok(Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?) };
    let site = EmbeddingSite {
        path,
        weight: &zeros,
        model,
    };
    for left_alone in ["all-linear", "q_proj"] {
        let adapter = on(left_alone).adapt_embedding(&site, &mut fresh())?;
        assert!(adapter.is_none(), "{left_alone}");
    }
    for named in ["embed_tokens", ".*embed_tokens"] {
        let adapter = on(named).adapt_embedding(&site, &mut fresh())?;
        assert!(adapter.is_some(), "{named}");
    }
    Ok(())
}

#[test]
fn an_adapted_embedding_is_the_frozen_one_and_the_scaled_update() -> Result<()> {
    let path = "model.embed_tokens";
    let model = &model();
    let base = tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])?;
    let weight = || -> Result<Tensor> { Ok(base.clone()) };
    let site = EmbeddingSite {
        path,
        weight: &weight,
        model,
    };
    let file = BTreeMap::from([
        (
            site.peft_name("lora_embedding_A"),
            tensor([[1.0, 2.0, 3.0]])?,
        ),
        (site.peft_name("lora_embedding_B"), tensor([[1.0], [10.0]])?),
    ]);
    let mut weights = AdapterWeights::loaded(file, &Device::Cpu);
    let lora = SavedLora(Lora {
        rank: 1,
        ..on("embed_tokens")
    });
    let adapter = lora.adapt_embedding(&site, &mut weights)?.expect("named");
    weights.finish()?;
    // The model computes it from its factors, without the whole update.
    assert_eq!(adapter.low_rank().expect("factors").scale, 2.0);
    let merged: [[f32; 2]; 3] = [[3.0, 21.0], [6.0, 42.0], [9.0, 63.0]];
    assert_eq!(adapter.merged_weight(&base)?.to_vec2::<f32>()?, merged);
    let tokens = Tensor::new(&[2u32, 0], &Device::Cpu)?;
    let rows = adapter.forward(&tokens, &base.index_select(&tokens, 0)?)?;
    assert_eq!(rows.to_vec2::<f32>()?, [merged[2], merged[0]]);
    Ok(())
}

#[test]
fn what_is_written_is_read_back() -> Result<()> {
    let lora = Lora {
        rank: 4,
        alpha: Some(16.0),
        dropout: 0.1,
        rslora: true,
        exclude: Some(".*layers\\.0.*".parse()?),
        layers: Some(LayerSelection::new(vec![1, 3])),
        rank_pattern: overrides_of(&["q_proj=2"]),
        alpha_pattern: overrides_of(&["q_proj=0.5", "k_proj=1e30"]),
        ..on("q_proj,k_proj,embed_tokens")
    };
    let written = lora.peft_config(&model(), &fresh())?;
    for (field, value) in [
        ("r", json!(4)),
        ("lora_alpha", json!(16)),
        ("lora_dropout", json!(0.1)),
        ("use_rslora", json!(true)),
        (
            "target_modules",
            json!(["q_proj", "k_proj", "embed_tokens"]),
        ),
        ("exclude_modules", json!(".*layers\\.0.*")),
        ("layers_to_transform", json!([1, 3])),
        ("rank_pattern", json!({"q_proj": 2})),
        ("alpha_pattern", json!({"q_proj": 0.5, "k_proj": 1e30})),
    ] {
        assert_eq!(written.get(field), Some(&value), "{field}");
    }
    let read = crate::method_of(&written, &SavedTensors::new())?;
    assert_eq!(read.peft_config(&model(), &fresh())?, written);
    Ok(())
}

#[test]
fn all_linear_is_written_as_the_names_that_were_adapted() -> Result<()> {
    let base = Frozen(Tensor::ones((3, 2), DType::F32, &Device::Cpu)?);
    let lora = Lora::default();
    let mut weights = fresh();
    for path in &paths()[1..] {
        at(&lora, path, &base, &mut weights)?;
    }
    let config = lora.peft_config(&model(), &weights)?;
    assert_eq!(
        config.get("target_modules"),
        Some(&json!(["k_proj", "q_proj", "up_proj"]))
    );
    Ok(())
}

#[test]
fn what_a_folder_leaves_out_is_pefts_default() -> Result<()> {
    let lora = Lora::from_peft(&mut config())?;
    assert_eq!((lora.rank, lora.alpha), (4, Some(8.0)));
    assert_eq!((lora.dropout, lora.rslora), (0.0, false));
    assert!(lora.exclude.is_none() && lora.layers.is_none());
    assert!(lora.rank_pattern.is_empty() && lora.alpha_pattern.is_empty());
    for missing in ["r", "target_modules"] {
        assert!(Lora::from_peft(&mut config().with(missing, Value::Null)).is_err());
    }
    Ok(())
}

#[test]
fn a_start_that_changes_the_base_is_refused() -> Result<()> {
    let start = |start: Value| config().with("init_lora_weights", start);
    for fine in [
        json!(true),
        json!(false),
        json!("gaussian"),
        json!("eva"),
        json!("orthogonal"),
    ] {
        Lora::from_peft(&mut start(fine))?;
    }
    for other in ["pissa", "olora", "corda"] {
        let error = Lora::from_peft(&mut start(json!(other))).expect_err(other);
        assert!(error.hint_text().is_some(), "{error}");
    }
    Ok(())
}

#[test]
fn trained_biases_are_refused() -> Result<()> {
    Lora::from_peft(&mut config().with("bias", "none"))?;
    for bias in ["all", "lora_only"] {
        assert!(Lora::from_peft(&mut config().with("bias", bias)).is_err());
    }
    Ok(())
}

#[test]
fn the_blocks_of_a_folder_are_a_number_or_a_list() -> Result<()> {
    let blocks = |blocks: Value| config().with("layers_to_transform", blocks);
    for (value, expected) in [(json!(3), vec![3]), (json!([3, 1]), vec![1, 3])] {
        let layers = Lora::from_peft(&mut blocks(value))?.layers;
        assert_eq!(layers, Some(LayerSelection::new(expected)));
    }
    assert_eq!(Lora::from_peft(&mut blocks(json!([])))?.layers, None);
    for wrong in [json!(-1), json!(1.5), json!("1"), json!([1, "2"])] {
        assert!(Lora::from_peft(&mut blocks(wrong)).is_err());
    }
    Ok(())
}

/// The modules that the method of a folder adapts, of linear layers of one size.
fn adapted_of(method: &dyn AdapterMethod, tensors: SavedTensors) -> Result<Vec<String>> {
    let mut weights = AdapterWeights::loaded(tensors, &Device::Cpu);
    let base = Frozen(Tensor::ones((3, 2), DType::F32, &Device::Cpu)?);
    let mut adapted = Vec::new();
    for path in &paths()[1..] {
        let site = LinearSite {
            path: path.as_str(),
            base: &base,
            model: &model(),
        };
        if method.adapt_linear(&site, &mut weights)?.is_some() {
            adapted.push(path.clone());
        }
    }
    weights.finish()?;
    Ok(adapted)
}

/// A file of LoRAs of rank 4 on these modules.
fn tensors_of(modules: &[&str]) -> Result<SavedTensors> {
    let mut tensors = SavedTensors::new();
    for module in modules {
        for (part, shape) in [("lora_A", (4usize, 2usize)), ("lora_B", (3, 4))] {
            let name = format!("base_model.model.{module}.{part}.weight");
            tensors.insert(name, Tensor::ones(shape, DType::F32, &Device::Cpu)?);
        }
    }
    Ok(tensors)
}

#[test]
fn blocks_that_a_folder_names_and_the_model_lacks_are_passed_over() -> Result<()> {
    let queries = "model.layers.0.self_attn.q_proj";
    let config = config().with("layers_to_transform", json!([0, 5]));
    let method = crate::method_of(&config, &tensors_of(&[queries])?)?;
    method.check(&model())?;
    assert!(method.unmatched(&paths()).is_empty());
    method.check_paths(&paths())?;
    let adapted = adapted_of(method.as_ref(), tensors_of(&[queries])?)?;
    assert_eq!(adapted, [queries]);
    // Its tensors must fit all the same.
    let beyond = tensors_of(&[queries, "model.layers.5.self_attn.q_proj"])?;
    let error = adapted_of(method.as_ref(), beyond).expect_err("there is no block 5");
    assert!(error.to_string().contains("layers.5"), "{error}");
    Ok(())
}

#[test]
fn a_pattern_that_looks_around_gives_way_to_the_files_names() -> Result<()> {
    let modules = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ];
    let tensors = tensors_of(&modules)?;
    let looking = r"model\.layers\.\d+\..*(?<!k)_proj";
    for config in [
        config().with("target_modules", looking),
        config()
            .with("target_modules", json!(["q_proj", "up_proj"]))
            .with("exclude_modules", r".*\.1\.(?=self_attn).*"),
    ] {
        let method = crate::method_of(&config, &tensors)?;
        assert_eq!(adapted_of(method.as_ref(), tensors.clone())?, modules);
        let written = method.peft_config(&model(), &fresh())?;
        assert_eq!(written.get("target_modules"), Some(&json!(modules)));
        assert_eq!(written.get("exclude_modules"), None);
    }
    // What is read as it stands is not replaced, and what no one can read is the file's fault.
    let read = config().with("target_modules", r"[(?!].*");
    let method = crate::method_of(&read, &tensors)?;
    let written = method.peft_config(&model(), &fresh())?;
    assert_eq!(written.get("target_modules"), read.get("target_modules"));
    for (config, tensors) in [
        (config().with("target_modules", "("), &tensors),
        (
            config().with("target_modules", looking),
            &SavedTensors::new(),
        ),
    ] {
        let error = crate::method_of(&config, tensors).map(|method| method.name());
        let error = error.expect_err("a pattern of no use");
        assert_eq!(error.kind(), ErrorKind::Failed);
        let place = "adapter_config.json: field `target_modules`: ";
        assert!(error.to_string().starts_with(place), "{error}");
    }
    Ok(())
}

#[test]
fn a_number_that_no_lora_can_have_is_named_with_its_field() {
    for (field, value) in [
        ("r", json!(0)),
        ("rank_pattern", json!({"q_proj": 2.5})),
        ("lora_dropout", json!(1)),
        ("lora_alpha", json!(1e39)),
        ("lora_alpha", json!(-1e39)),
        ("alpha_pattern", json!({"q_proj": 1e39})),
        ("alpha_pattern", json!({"q_proj": "8"})),
        ("alpha_pattern", json!({"(": 8})),
        ("target_modules", json!("(")),
        ("target_modules", json!(".*(?!k)_proj")),
        ("exclude_modules", json!("(?<=k)_proj")),
    ] {
        let error = Lora::from_peft(&mut config().with(field, value)).expect_err(field);
        assert_eq!(error.kind(), ErrorKind::Failed);
        assert!(error.to_string().contains(&format!("`{field}`")), "{error}");
    }
}

#[test]
fn a_folder_has_no_more_patterns_than_a_model_has_layers() {
    let patterns = |count| {
        let entries: Map<String, Value> = (0..count)
            .map(|layer| (format!("layers.{layer}.q_proj"), json!("no number")))
            .collect();
        let mut config = config().with("rank_pattern", entries);
        Lora::from_peft(&mut config)
            .expect_err("wrong in each entry")
            .to_string()
    };
    let wrong_entry = patterns(MOST_OVERRIDES);
    assert!(wrong_entry.contains("`layers.0.q_proj`"), "{wrong_entry}");
    let too_many = patterns(MOST_OVERRIDES + 1);
    assert!(too_many.contains("has 4097 entries"), "{too_many}");
}

#[test]
fn an_override_is_a_name_and_a_number() {
    let entry: Override = " q_proj = 16 ".parse().expect("a name and a number");
    assert_eq!((entry.name.as_str(), entry.value), ("q_proj", 16.0));
    for wrong in ["q_proj", "q_proj=", "q_proj=many", "(=1"] {
        let error = wrong.parse::<Override>().expect_err(wrong);
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}
