//! What stands in for a model in tests, and the laws of the walk through one.

use super::*;
use crate::last_layers::LastLayers;
use crate::lora::Lora;
use crate::prompt::Prompt;
use crate::storage::{AdapterWeights, Init};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// A frozen layer that is nothing but its weight, `(out_features, in_features)`.
pub(crate) struct Frozen(pub(crate) Tensor);

impl BaseLinear for Frozen {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.0.t()?)?)
    }

    fn weight(&self) -> Result<Tensor> {
        Ok(self.0.clone())
    }

    fn in_features(&self) -> usize {
        self.0.dims()[1]
    }

    fn out_features(&self) -> usize {
        self.0.dims()[0]
    }
}

/// A tokenizer whose tokens are bytes, and their embedding rows of two values.
pub(crate) struct Letters;

impl TextRows for Letters {
    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn rows(&self, tokens: &[u32]) -> Result<Tensor> {
        let row = |token: &u32| row_of(u8::try_from(*token).expect("a byte"));
        let values: Vec<f32> = tokens.iter().flat_map(row).collect();
        Ok(Tensor::from_vec(values, (tokens.len(), 2), &Device::Cpu)?)
    }
}

/// The embedding row of a token of [`Letters`].
pub(crate) fn row_of(token: u8) -> Vec<f32> {
    vec![f32::from(token), -f32::from(token)]
}

const QUERIES: &str = "model.layers.3.self_attn.q_proj";
const KEYS: &str = "model.layers.3.self_attn.k_proj";
const EMBEDDING: &str = "model.embed_tokens";

/// Four blocks, and hidden states of two values.
fn model() -> ModelShape {
    ModelShape {
        hidden_size: 2,
        layers: 4,
        vocabulary: 5,
        head_path: "lm_head",
        ..ModelShape::default()
    }
}

fn ones() -> Result<Tensor> {
    Ok(Tensor::ones((2, 2), DType::F32, &Device::Cpu)?)
}

fn fresh() -> AdapterWeights {
    AdapterWeights::fresh(1, &Device::Cpu)
}

/// A walk through two linear layers and the embedding: which of them the method adapts, and how the walk ends.
fn walk(lora: &Lora, weights: AdapterWeights) -> Result<(Vec<&'static str>, AdapterWeights)> {
    let mut injector = Injector::new(lora, weights, model())?;
    let mut adapted = Vec::new();
    for path in [QUERIES, KEYS] {
        if injector.adapt_linear(path, &Frozen(ones()?))?.is_some() {
            adapted.push(path);
        }
    }
    if injector.adapt_embedding(EMBEDDING, &ones)?.is_some() {
        adapted.push(EMBEDDING);
    }
    Ok((adapted, injector.finish()?))
}

fn on(targets: &str) -> Lora {
    Lora {
        targets: targets.parse().expect("targets"),
        ..Lora::default()
    }
}

#[test]
fn a_path_says_block_and_head() {
    let model = &model();
    let base = &Frozen(ones().expect("a weight"));
    for (path, layer, is_head) in [
        (QUERIES, Some(3), false),
        ("model.layers.12.mlp.experts.7.up_proj", Some(12), false),
        ("lm_head", None, true),
        ("model.lm_head", None, false),
    ] {
        let site = LinearSite { path, base, model };
        assert_eq!((site.layer(), site.is_head()), (layer, is_head), "{path}");
    }
    for (name, layer, is_head) in [
        ("model.layers.3.mlp.up_proj.weight", Some(3), false),
        ("model.norm.weight", None, false),
        ("lm_head.bias", None, true),
        ("lm_head_norm.weight", None, false),
    ] {
        let site = ParameterSite { name, model };
        assert_eq!((site.layer(), site.is_head()), (layer, is_head), "{name}");
    }
}

#[test]
fn a_tensor_has_pefts_name() {
    let model = &model();
    let base = &Frozen(ones().expect("a weight"));
    let path = "lm_head";
    let linear = LinearSite { path, base, model };
    let weight = &ones;
    let embedding = EmbeddingSite {
        path,
        weight,
        model,
    };
    let name = "base_model.model.lm_head.lora_A.weight";
    assert_eq!(linear.peft_name("lora_A.weight"), name);
    assert_eq!(embedding.peft_name("lora_A.weight"), name);
}

#[test]
fn the_bare_base_is_left_as_it_is() -> Result<()> {
    assert_eq!(NoAdapter.name(), "base");
    assert_eq!(NoAdapter.default_learning_rate(), 0.0);
    assert!(NoAdapter.peft_config(&model(), &fresh()).is_err());

    let mut injector = Injector::new(&NoAdapter, fresh(), model())?;
    let base = Frozen(ones()?);
    assert!(injector.adapt_linear(QUERIES, &base)?.is_none());
    assert!(injector.adapt_embedding(EMBEDDING, &ones)?.is_none());
    assert!(injector.soft_prompt(&Letters)?.is_none());
    let read = || Err(Error::new("a frozen weight is not read"));
    assert!(injector.parameter("lm_head.weight", read)?.is_none());
    assert!(injector.finish()?.is_empty());
    Ok(())
}

#[test]
fn a_walk_ends_with_the_weights_of_the_sites_that_were_adapted() -> Result<()> {
    let (adapted, weights) = walk(&on("q_proj,embed_tokens"), fresh())?;
    assert_eq!(adapted, [QUERIES, EMBEDDING]);
    let names: Vec<&str> = weights.iter().map(|(name, _)| name).collect();
    assert_eq!(
        names,
        [
            "base_model.model.model.embed_tokens.lora_embedding_A",
            "base_model.model.model.embed_tokens.lora_embedding_B",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight",
        ]
    );
    Ok(())
}

#[test]
fn a_trained_weight_starts_as_the_bases_and_is_stored_under_its_name() -> Result<()> {
    let method = LastLayers {
        blocks: 1,
        ..LastLayers::default()
    };
    let mut injector = Injector::new(&method, fresh(), model())?;
    let name = "model.layers.3.mlp.up_proj.weight";
    let trained = injector.parameter(name, ones)?.expect("of the last block");
    assert_eq!(trained.to_vec2::<f32>()?, [[1.0; 2]; 2]);
    let frozen = injector.parameter("model.layers.2.mlp.up_proj.weight", ones)?;
    assert!(frozen.is_none());
    let error = injector
        .parameter("model.layers.3.mlp.down_proj.weight", || {
            Err(Error::new("the file ends here"))
        })
        .expect_err("no weight to start from");
    assert_eq!(
        error.to_string(),
        "model.layers.3.mlp.down_proj.weight: the file ends here"
    );
    let weights = injector.finish()?;
    assert!(weights.get(&format!("base_model.model.{name}")).is_some());
    assert_eq!(weights.parameter_count(), 4);
    Ok(())
}

#[test]
fn a_prompt_is_asked_for_at_the_input() -> Result<()> {
    let prompt = Prompt {
        virtual_tokens: 3,
        ..Prompt::default()
    };
    let mut injector = Injector::new(&prompt, fresh(), model())?;
    let rows = injector.soft_prompt(&Letters)?.expect("rows");
    assert_eq!(rows.rows()?.dims(), [3, 2]);
    Ok(())
}

#[test]
fn a_prompt_of_no_rows_is_empty() {
    struct Rows(usize);

    impl SoftPrompt for Rows {
        fn rows(&self) -> Result<Tensor> {
            Ok(Tensor::zeros((self.0, 2), DType::F32, &Device::Cpu)?)
        }

        fn len(&self) -> usize {
            self.0
        }
    }

    assert!(Rows(0).is_empty());
    assert!(!Rows(1).is_empty());
}

#[test]
fn what_the_model_cannot_do_is_said_before_the_walk() {
    let method = LastLayers {
        blocks: 5,
        ..LastLayers::default()
    };
    assert!(Injector::new(&method, fresh(), model()).is_err());
}

#[test]
fn a_site_that_fails_is_named() {
    let tied = ModelShape {
        tied_head: true,
        ..model()
    };
    let lora = on("lm_head");
    let mut injector = Injector::new(&lora, fresh(), tied).expect("possible so far");
    let base = Frozen(ones().expect("a weight"));
    let error = injector
        .adapt_linear("lm_head", &base)
        .map(|adapter| adapter.is_some())
        .expect_err("a tied head");
    assert!(error.to_string().starts_with("lm_head: "), "{error}");
}

#[test]
fn a_name_that_no_layer_has_is_answered_with_near_ones_or_with_all() {
    let hint = |targets| {
        let error = walk(&on(targets), fresh()).expect_err(targets);
        assert_eq!(
            error.to_string(),
            format!("no layer matches `{targets}`"),
            "{targets}"
        );
        error.hint_text().unwrap_or_default().to_owned()
    };
    assert_eq!(hint("embed_token"), "the model has `embed_tokens`");
    assert_eq!(
        hint("xyz"),
        "the model has `embed_tokens`, `k_proj`, `q_proj`"
    );
}

#[test]
fn options_without_effect_are_refused_in_a_new_adapter() -> Result<()> {
    let beside = Lora {
        rank_pattern: vec!["k_proj=3".parse()?],
        ..on("q_proj")
    };
    let error = walk(&beside, fresh()).expect_err("no such layer is adapted");
    assert!(error.to_string().contains("`k_proj`"), "{error}");
    Ok(())
}

#[test]
fn a_loaded_adapter_says_by_its_tensors_what_it_fits() -> Result<()> {
    let file = || -> Result<BTreeMap<String, Tensor>> {
        let (_, mut weights) = walk(&on("q_proj"), fresh())?;
        weights.var("left", (1, 1), Init::Ones)?;
        Ok(weights
            .iter()
            .map(|(name, var)| (name.to_owned(), var.as_tensor().clone()))
            .collect())
    };
    let mut fits = file()?;
    fits.remove("left");
    let lora = on("q_proj,no_such_layer");
    let (adapted, _) = walk(&lora, AdapterWeights::loaded(fits, &Device::Cpu))?;
    assert_eq!(adapted, [QUERIES]);
    let error = walk(&lora, AdapterWeights::loaded(file()?, &Device::Cpu))
        .expect_err("a tensor too many")
        .to_string();
    assert!(error.contains("`left` fits no place"), "{error}");
    Ok(())
}
