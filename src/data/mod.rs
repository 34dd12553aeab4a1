//! From records to examples to flat batches.
//!
//! | file | what it knows | type |
//! |---|---|---|
//! | `record_reader.rs` | files, lines, gzip | [`read_records`] |
//! | `records.rs` | what a record says | [`Record`] |
//! | `chat_template.rs` | the model's own layout of a conversation | [`ChatTemplate`] |
//! | `template_date.rs` | the date that it reads | [`TemplateDate`] |
//! | `python.rs` | what that layout expects of Python | |
//! | `learned_spans.rs` | which of a conversation's text the model itself must say | |
//! | `tokenizer.rs` | text to tokens and back | [`Tokenizer`] |
//! | `tokenizer_limits.rs` | what a stranger's tokenizer may ask for | |
//! | `text_stream.rs` | text out of tokens that arrive one by one | [`TextStream`] |
//! | `examples.rs` | tokens, and which of them are learned | [`Example`] |
//! | `dataset.rs` | all examples of a run, and a report | [`Dataset`] |
//! | `prompt.rs` | what a model is to go on from | [`Prompt`] |
//! | `quote.rs` | names out of strangers' files, in messages | |
//! | `optional_file.rs` | what a folder may lack | |
//! | `order.rs` | which example comes when | [`Order`] |
//! | `batch.rs` | examples laid end to end; targets | [`Batch`] |

mod batch;
mod chat_template;
mod dataset;
mod examples;
#[cfg(test)]
mod golden;
mod learned_spans;
mod optional_file;
mod order;
mod prompt;
mod python;
mod quote;
mod record_reader;
mod records;
mod template_date;
mod text_stream;
mod tokenizer;
mod tokenizer_limits;

pub use batch::{Batch, IGNORE, collate, passes};
pub use chat_template::{ChatTemplate, GenerationPrompt};
pub use dataset::{DataOptions, DataReport, Dataset};
pub use examples::{Answer, Example, Learn};
pub(crate) use optional_file::{has_file, has_folder};
pub use order::Order;
pub use prompt::{Layout, Prompt, read_prompts};
pub(crate) use quote::{quoted, shortened};
pub use record_reader::{Origin, read_records};
pub use records::{Conversation, Instruction, Message, Record};
pub use template_date::TemplateDate;
pub use text_stream::TextStream;
pub use tokenizer::{AddSpecial, Encoding, SpecialTokens, Tokenizer};
