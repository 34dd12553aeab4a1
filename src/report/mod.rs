//! What a run leaves for people to read: metrics, pictures, event files, the model card.

mod chart;
pub mod format;
pub mod loss_plot;
pub mod markdown;
pub mod memory;
pub mod metrics;
pub mod model_card;
pub mod tensorboard;
