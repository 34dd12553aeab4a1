//! From records to examples to flat batches.
//!
//! ```text
//! records.rs    what a line of a data file says      Record
//! chat_template the model's own layout of a chat     ChatTemplate
//! learned_spans which of its text the model must say
//! tokenizer     text to tokens and back              Tokenizer, TextStream
//! examples      tokens and which of them are learned Example
//! dataset       all of a run's examples, and a report Dataset
//! order         which example comes when             Order
//! batch         examples laid end to end             Batch
//! ```

mod batch;
mod dataset;
mod examples;
mod order;
mod text_stream;
mod tokenizer;

pub use batch::{Batch, IGNORE, collate, passes};
pub use dataset::{DataOptions, DataReport, Dataset};
pub use examples::{Answer, Example, Learn};
pub use order::Order;
pub use text_stream::TextStream;
pub use tokenizer::{AddSpecial, Encoding, SpecialTokens, Tokenizer};
