//! What a model offers while it loads, and what a method answers.

mod base_linear;
mod dropout;
mod injector;
mod method;
mod site;
mod targets;
#[cfg(test)]
pub(crate) mod tests;

pub use base_linear::BaseLinear;
pub use dropout::Dropout;
pub use injector::Injector;
pub(crate) use injector::quoted;
pub use method::{
    AdapterMethod, EmbeddingAdapter, LinearAdapter, LowRank, MethodEntry, Mode, NoAdapter,
    SoftPrompt,
};
pub use site::{
    EmbeddingSite, InputSite, LinearSite, ModelShape, ParameterSite, TextRows, layer_of,
};
pub use targets::{LayerSelection, Targets, suggest};
