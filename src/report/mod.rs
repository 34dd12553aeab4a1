//! What a run leaves for people to read: metrics, plots, event files, the model card.

mod chart;
pub mod loss_plot;
pub mod memory;
pub mod metrics;
pub mod tensorboard;
