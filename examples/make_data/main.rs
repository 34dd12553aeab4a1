//! Writes the data of the bundled base model and of the quickstart.
//!
//! `cargo run --release --example make_data -- --out DIR` writes
//!
//! - `base.jsonl`, the text to pretrain on: stories, diaries, letters,
//!   descriptions and dialogues from a seeded grammar;
//! - `unrelated.jsonl`, text of the same kind that pretraining never sees, to
//!   measure what a fine-tune forgets;
//! - `domain/`, support tickets with structured replies, to fine-tune on.
//!
//! The same seed gives the same bytes on every platform.
#![allow(clippy::print_stdout)]

mod dice;
mod domain;
mod essays;
mod grammar;
mod prose;
mod talk;
mod words;
mod world;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::Parser;
use serde_json::{Value, json};

use crate::dice::{Dice, Stream};

/// Write the data of the bundled base model and of the quickstart.
#[derive(Parser)]
struct Args {
    /// Where to write it.
    #[arg(long, default_value = "examples/data")]
    out: PathBuf,
    /// What everything is drawn from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How much text to pretrain on, in millions of bytes; 0 writes none.
    #[arg(long, default_value_t = 40.0)]
    megabytes: f64,
}

const TRAIN: usize = 1500;
const EVAL: usize = 200;
/// Upper limit of `unrelated.jsonl` in bytes.
const UNRELATED: usize = 60_000;
/// In percent of the base's documents.
const DIALOGUES: usize = 50;

fn main() -> io::Result<()> {
    let Args {
        out,
        seed,
        megabytes,
    } = Args::parse();
    fs::create_dir_all(out.join("domain"))?;

    let (train, eval) = domain::splits(seed, TRAIN, EVAL);
    for (name, tickets) in [("train", &train), ("eval", &eval)] {
        write(
            &out.join(format!("domain/{name}.jsonl")),
            tickets.iter().map(ticket),
        )?;
    }
    fs::write(out.join("domain/README.md"), domain::readme(&train, &eval))?;

    let unrelated = (0..).map(|index| {
        let mut dice = Dice::new(seed, Stream::Unrelated, index);
        json!({ "text": text(&mut dice) })
    });
    write(&out.join("unrelated.jsonl"), up_to(UNRELATED, unrelated))?;

    let limit = (megabytes * 1e6) as usize;
    if limit > 0 {
        let documents = (0..).map(|index| document(&mut Dice::new(seed, Stream::Base, index)));
        write(&out.join("base.jsonl"), up_to(limit, documents))?;
    }
    Ok(())
}

/// A ticket's record.
fn ticket(ticket: &domain::Ticket) -> Value {
    messages(None, &[(ticket.text.clone(), ticket.reply.clone())])
}

/// One document to pretrain on.
fn document(dice: &mut Dice) -> Value {
    match dice.chance(DIALOGUES) {
        true => {
            let talk = talk::any(dice);
            messages(talk.system.as_deref(), &talk.turns)
        }
        false => json!({ "text": text(dice) }),
    }
}

/// A text of 50 to 400 words.
fn text(dice: &mut Dice) -> String {
    loop {
        let text = prose::any(dice);
        let words = text.split_whitespace().count();
        if (50..=400).contains(&words) {
            return text;
        }
    }
}

/// A record of turns, as chat datasets have them.
fn messages(system: Option<&str>, turns: &[talk::Turn]) -> Value {
    let mut messages = Vec::new();
    if let Some(system) = system {
        messages.push(json!({ "role": "system", "content": system }));
    }
    for (ask, answer) in turns {
        messages.push(json!({ "role": "user", "content": ask }));
        messages.push(json!({ "role": "assistant", "content": answer }));
    }
    json!({ "messages": messages })
}

/// As many of `records` as fit into `limit` bytes.
fn up_to(limit: usize, records: impl Iterator<Item = Value>) -> impl Iterator<Item = Value> {
    let mut left = limit;
    records.map_while(move |record| {
        left = left.checked_sub(record.to_string().len() + 1)?;
        Some(record)
    })
}

/// Writes one record per line, and says how much that was.
fn write(path: &Path, records: impl Iterator<Item = Value>) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let (mut count, mut bytes) = (0_usize, 0_usize);
    for record in records {
        let line = record.to_string();
        writeln!(file, "{line}")?;
        count += 1;
        bytes += line.len() + 1;
    }
    file.flush()?;
    println!("{}: {count} records, {bytes} bytes", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_document() {
        let draw = |seed| document(&mut Dice::new(seed, Stream::Base, 7));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn the_committed_tickets_are_what_the_generator_writes() {
        let (train, eval) = domain::splits(1, TRAIN, EVAL);
        let lines = |tickets: &[domain::Ticket]| -> String {
            tickets
                .iter()
                .map(|each| format!("{}\n", ticket(each)))
                .collect()
        };
        assert!(
            lines(&train) == include_str!("../data/domain/train.jsonl"),
            "train.jsonl is stale"
        );
        assert!(
            lines(&eval) == include_str!("../data/domain/eval.jsonl"),
            "eval.jsonl is stale"
        );
    }

    #[test]
    fn the_base_never_sees_the_reply_format() {
        for index in 0..3000 {
            let record = document(&mut Dice::new(1, Stream::Base, index)).to_string();
            for key in ["category:", "product:", "order:", "priority:", "action:"] {
                assert!(
                    !record.contains(key),
                    "document {index} has {key:?}: {record}"
                );
            }
        }
    }

    #[test]
    fn documents_leave_no_template_behind() {
        for index in 0..3000 {
            let record = document(&mut Dice::new(5, Stream::Base, index)).to_string();
            let inner = record.replace("[{\"role\"", "").replace("},{\"role\"", "");
            assert!(!inner.contains(" {") && !inner.contains("[|"), "{record}");
        }
    }
}
