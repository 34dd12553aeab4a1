//! Reading `config.json`: published files, defaults, and everything that must be refused.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

/// The fields of published checkpoints, by their hub id.
fn published(id: &str) -> ModelConfig {
    let all: Value = serde_json::from_str(include_str!("published.json")).expect("valid JSON");
    ModelConfig::parse(&all[id].to_string()).expect(id)
}

/// A small llama with some fields replaced; null removes nothing, `"absent"` removes the field.
fn small(changes: Value) -> Result<ModelConfig> {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": true
    });
    let map = config.as_object_mut().expect("an object");
    for (name, value) in changes.as_object().expect("an object") {
        if value == "absent" {
            map.shift_remove(name);
        } else {
            map.insert(name.clone(), value.clone());
        }
    }
    ModelConfig::parse(&config.to_string())
}

fn refused(changes: Value) -> String {
    small(changes).expect_err("must be refused").to_string()
}

#[test]
fn reads_published_llamas() {
    let llama2 = published("meta-llama/Llama-2-7b-hf");
    assert_eq!(
        (llama2.hidden_size, llama2.intermediate_size, llama2.layers),
        (4096, 11008, 32)
    );
    assert_eq!(
        (
            llama2.attention_heads,
            llama2.key_value_heads,
            llama2.head_dim
        ),
        (32, 32, 128)
    );
    assert_eq!(
        llama2.rope,
        RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::None
        }
    );
    assert_eq!((llama2.dtype, llama2.tied_head), (Some(DType::F16), false));

    let llama3 = published("meta-llama/Llama-3.2-1B-Instruct");
    assert_eq!(
        (llama3.head_dim, llama3.max_positions, llama3.tied_head),
        (64, 131_072, true)
    );
    assert_eq!(
        (llama3.first_token, llama3.end_tokens),
        (Some(128_000), vec![128_001, 128_008, 128_009])
    );
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_frequency_factor: 1.0,
        high_frequency_factor: 4.0,
        original_positions: 8192,
    };
    assert_eq!(
        llama3.rope,
        RopeConfig {
            theta: 500_000.0,
            scaling
        }
    );

    assert_eq!(published("meta-llama/Llama-3.2-1B").end_tokens, [128_001]);
    assert_eq!(
        published("TinyLlama/TinyLlama-1.1B-Chat-v1.0").key_value_heads,
        4
    );
    let smol = published("HuggingFaceTB/SmolLM2-135M");
    assert_eq!(
        (smol.head_dim, smol.rope.theta, smol.first_token),
        (64, 100_000.0, Some(0))
    );
    assert_eq!(
        published("HuggingFaceTB/SmolLM2-135M-Instruct").end_tokens,
        [2]
    );
}

#[test]
fn reads_published_mistrals() {
    let first = published("mistralai/Mistral-7B-v0.1");
    assert_eq!(first.sliding_windows, vec![Some(4096); 32]);
    assert_eq!(
        first.attention_bias,
        AttentionBias {
            query_key_value: false,
            output: false
        }
    );
    let third = published("mistralai/Mistral-7B-v0.3");
    assert_eq!(third.sliding_windows, vec![None; 32]);
    assert_eq!((third.head_dim, third.rope.theta), (128, 1e6));
}

#[test]
fn reads_published_qwens() {
    let qwen2 = published("Qwen/Qwen2.5-0.5B");
    assert_eq!(
        qwen2.attention_bias,
        AttentionBias {
            query_key_value: true,
            output: false
        }
    );
    assert_eq!(
        (qwen2.head_dim, qwen2.query_key_norm, qwen2.tied_head),
        (64, false, true)
    );
    assert_eq!(qwen2.sliding_windows, vec![None; 24]);

    let qwen3 = published("Qwen/Qwen3-0.6B");
    assert_eq!(
        (qwen3.head_dim, qwen3.query_key_norm, qwen3.hidden_size),
        (128, true, 1024)
    );
    assert_eq!(
        qwen3.attention_bias,
        AttentionBias {
            query_key_value: false,
            output: false
        }
    );

    let saved = published("saved by transformers 5");
    assert_eq!(
        (saved.dtype, saved.first_token, saved.end_tokens),
        (Some(DType::BF16), None, vec![2])
    );
    assert_eq!(saved.sliding_windows, [None, Some(64)]);
    let RopeScaling::Yarn(yarn) = saved.rope.scaling else {
        panic!("expected yarn")
    };
    assert_eq!(
        (yarn.factor, yarn.original_positions, yarn.truncate),
        (4.0, 128, true)
    );
    assert!((yarn.attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn absent_fields_take_the_defaults_of_transformers() {
    let llama = small(json!({
        "num_key_value_heads": "absent", "max_position_embeddings": "absent", "rope_theta": "absent",
        "rms_norm_eps": "absent", "tie_word_embeddings": "absent"
    }))
    .expect("a llama");
    assert_eq!(
        (llama.key_value_heads, llama.max_positions, llama.rope.theta),
        (8, 2048, 10_000.0)
    );
    assert_eq!(
        (llama.rms_norm_epsilon, llama.tied_head, llama.activation),
        (1e-6, false, Activation::Silu)
    );
    let mistral = small(json!({"model_type": "mistral", "num_key_value_heads": "absent"}))
        .expect("a mistral");
    assert_eq!(
        (mistral.key_value_heads, &mistral.sliding_windows[0]),
        (8, &Some(4096))
    );
    assert_eq!(
        (mistral.first_token, mistral.end_tokens),
        (Some(1), vec![2])
    );
    let null =
        small(json!({"model_type": "mistral", "num_key_value_heads": null, "head_dim": null}))
            .expect("a mistral");
    assert_eq!((null.key_value_heads, null.head_dim), (8, 8));
    assert_eq!(
        small(json!({"model_type": "qwen3"}))
            .expect("a qwen3")
            .head_dim,
        128
    );
    assert!(
        refused(json!({"model_type": "qwen2", "num_key_value_heads": "absent"})).contains("(32)")
    );
}

#[test]
fn fields_of_the_architecture_are_read() {
    let activation = |name: &str| small(json!({"hidden_act": name})).expect(name).activation;
    assert_eq!(activation("gelu"), Activation::Gelu);
    assert_eq!(activation("gelu_new"), Activation::GeluTanh);
    assert_eq!(activation("gelu_pytorch_tanh"), Activation::GeluTanh);
    let biased = small(json!({"attention_bias": true, "mlp_bias": true})).expect("biases");
    assert!(
        biased.attention_bias.query_key_value
            && biased.attention_bias.output
            && biased.feed_forward_bias
    );
    let dropped = small(json!({"attention_dropout": 0.1})).expect("noted, not refused");
    assert_eq!(dropped.notes.len(), 1);
    assert_eq!(
        small(json!({"eos_token_id": [-1, 3], "bos_token_id": -1}))
            .expect("tokens")
            .end_tokens,
        [3]
    );
    assert_eq!(
        small(json!({"dtype": "float32", "torch_dtype": "float16"}))
            .expect("both")
            .dtype,
        Some(DType::F32)
    );
    let windows = |changes| small(changes).expect("windows").sliding_windows;
    let qwen = json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 7, "max_window_layers": 3});
    assert_eq!(windows(qwen), [None, None, None, Some(7), Some(7)]);
    assert_eq!(
        windows(json!({"layer_types": vec!["full_attention"; 5]})),
        vec![None; 5]
    );
}

#[test]
fn reads_every_way_to_write_rotary_parameters() {
    let rope = |changes| small(changes).expect("rotary parameters").rope;
    let linear = RopeConfig {
        theta: 10_000.0,
        scaling: RopeScaling::Linear { factor: 2.0 },
    };
    assert_eq!(
        rope(json!({"rope_scaling": {"type": "linear", "factor": 2}})),
        linear
    );
    assert_eq!(
        rope(json!({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}})),
        linear
    );
    assert_eq!(
        rope(json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}})),
        linear
    );
    let uniform = json!({"rope_type": "linear", "factor": 2.0});
    assert_eq!(
        rope(json!({"rope_parameters": {"full_attention": uniform, "sliding_attention": uniform}})),
        linear
    );
    let dynamic =
        rope(json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 5e5}));
    assert_eq!(
        dynamic,
        RopeConfig {
            theta: 5e5,
            scaling: RopeScaling::Dynamic { factor: 4.0 }
        }
    );
    assert_eq!(
        rope(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}})).theta,
        3e4
    );
    assert_eq!(
        rope(json!({"rope_parameters": {}, "partial_rotary_factor": 1.0})).scaling,
        RopeScaling::None
    );

    let yarn = |changes: Value| {
        let mut map =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
        map.as_object_mut()
            .expect("an object")
            .extend(changes.as_object().expect("an object").clone());
        match rope(json!({"rope_scaling": map})).scaling {
            RopeScaling::Yarn(yarn) => yarn,
            other => panic!("expected yarn, got {other:?}"),
        }
    };
    assert_eq!(
        (yarn(json!({})).beta_fast, yarn(json!({})).beta_slow),
        (32.0, 1.0)
    );
    assert_eq!(yarn(json!({"attention_factor": 1.5})).attention_factor, 1.5);
    assert_eq!(
        yarn(json!({"mscale": 1.0, "mscale_all_dim": 1.0})).attention_factor,
        1.0
    );
    assert_eq!(yarn(json!({"factor": null})).factor, 4.0);
    assert!(!yarn(json!({"truncate": false})).truncate);
}

#[test]
fn refuses_what_would_change_the_result_all_at_once() {
    let error = small(json!({
        "quantization_config": {"bits": 4}, "pretraining_tp": 2, "residual_multiplier": 0.22,
        "embedding_multiplier": 1.0, "made_up": 7, "made_up_too": false, "empty": {}
    }))
    .expect_err("must be refused");
    let text = error.to_string();
    for part in [
        "`quantization_config` = {\"bits\":4}",
        "`pretraining_tp` = 2",
        "`residual_multiplier` = 0.22",
        "`made_up` = 7",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(
        !text.contains("embedding_multiplier")
            && !text.contains("made_up_too")
            && !text.contains("empty")
    );
    assert!(error.hint_text().is_some());
}

#[test]
fn refuses_rotations_that_are_not_implemented() {
    assert!(refused(json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}})).contains("longrope"));
    assert!(
        refused(json!({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}))
            .contains("`rope_scaling.mrope_section`")
    );
    assert!(
        refused(json!({"rope_scaling": {"factor": 2.0}})).contains("`rope_scaling.factor` = 2")
    );
    assert!(
        refused(json!({"rope_scaling": {"type": "linear"}}))
            .contains("rope_scaling: `factor` is missing")
    );
    assert!(refused(json!({"partial_rotary_factor": 0.5})).contains("partial_rotary_factor"));
    assert!(
        refused(json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}))
            .contains("partial_rotary_factor")
    );
    assert!(refused(json!({"rope_interleaved": true})).contains("rope_interleaved"));
    let layers =
        json!({"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}});
    assert!(refused(json!({"rope_parameters": layers})).contains("different layers"));
    assert!(refused(json!({"rope_theta": 0})).contains("rope_theta"));
}

#[test]
fn names_missing_fields_and_unknown_models() {
    let text = refused(json!({"hidden_size": "absent", "vocab_size": null}));
    assert!(
        text.contains("`hidden_size`") && text.contains("`vocab_size`"),
        "{text}"
    );
    let unknown = small(json!({"model_type": "mamba"})).expect_err("unknown");
    assert!(
        unknown.to_string().contains("`mamba`")
            && unknown.hint_text().expect("a hint").contains("`qwen3`")
    );
    assert!(refused(json!({"model_type": "absent"})).contains("`model_type`"));
    assert!(
        ModelConfig::parse("[1]")
            .expect_err("no object")
            .to_string()
            .contains("object")
    );
    assert!(
        ModelConfig::parse("{")
            .expect_err("no JSON")
            .to_string()
            .contains("JSON")
    );
    let folder = tempfile::tempdir().expect("a folder");
    assert!(
        ModelConfig::read(folder.path())
            .expect_err("no file")
            .to_string()
            .contains("config.json")
    );
}

#[test]
fn refuses_insane_values() {
    for (changes, part) in [
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "not a multiple"),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads"),
        (json!({"head_dim": 7}), "head_dim"),
        (json!({"hidden_size": 65}), "not a multiple"),
        (json!({"hidden_size": -1}), "whole number"),
        (json!({"hidden_size": 64.5}), "whole number"),
        (json!({"vocab_size": 1e18 as u64}), "vocab_size"),
        (json!({"num_hidden_layers": u64::MAX}), "num_hidden_layers"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
        (
            json!({"model_type": "mistral", "sliding_window": 0}),
            "sliding_window",
        ),
        (json!({"eos_token_id": 512}), "512"),
        (json!({"eos_token_id": "</s>"}), "eos_token_id"),
        (json!({"layer_types": ["full_attention"]}), "layer_types"),
        (
            json!({"layer_types": vec!["linear_attention"; 5]}),
            "linear_attention",
        ),
        (json!({"sliding_window": 16}), "sliding_window"),
        (json!({"hidden_act": "relu"}), "relu"),
        (json!({"tie_word_embeddings": "yes"}), "true or false"),
        (json!({"dtype": "float8_e4m3fn"}), "float8_e4m3fn"),
        (
            json!({"model_type": "mistral", "attention_bias": true}),
            "attention_bias",
        ),
        (
            json!({"rope_scaling": {"type": "dynamic", "factor": 0.5}}),
            "dynamic",
        ),
    ] {
        let text = refused(changes);
        assert!(text.contains(part), "{part} in {text}");
    }
}

/// Any JSON value, three levels deep.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
        prop_oneof![
            Just("yarn"),
            Just("dynamic"),
            Just("llama3"),
            Just("full_attention")
        ]
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 16, 4, |inner| {
        let name = prop_oneof![
            Just("factor".to_owned()),
            Just("rope_type".to_owned()),
            Just("original_max_position_embeddings".to_owned()),
            Just("full_attention".to_owned()),
            "[a-z_]{1,8}"
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((name, inner), 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        let _ = ModelConfig::parse(&text);
    }

    #[test]
    fn any_value_of_any_field_is_read_or_refused(
        kind in prop_oneof![Just("llama"), Just("mistral"), Just("qwen2"), Just("qwen3")],
        field in prop::sample::select(vec![
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_bias", "layer_types",
            "use_sliding_window", "sliding_window", "max_window_layers", "rope_theta", "rope_scaling", "rope_parameters",
            "bos_token_id", "eos_token_id", "dtype", "partial_rotary_factor", "original_max_position_embeddings", "unknown",
        ]),
        value in any_json(),
    ) {
        if let Ok(config) = small(json!({"model_type": kind, field: value})) {
            // What was accepted can also be computed with.
            let rotary = crate::model::rotary::Rotary::new(&config.rope, config.head_dim, config.max_positions);
            let (cosines, sines) = rotary.table(&[0, 1, 1000], 100_000);
            prop_assert!(cosines.iter().chain(&sines).all(|value| value.is_finite()));
        }
    }
}
