//! Documents laid end to end and cut into segments of equal length: every position of every batch is learned from.

use crate::data::{DataReport, Dataset, Example};
use crate::{Error, Result};

/// Segments of exactly `length` tokens from the documents of `documents`, in their order. Each document is followed by
/// `eos` unless it ends with it. What is left over at the end is too short for a segment and falls away.
pub(super) fn packed(documents: Dataset, length: usize, eos: u32) -> Result<Dataset> {
    let mut report = DataReport {
        records: documents.report.records,
        ..DataReport::default()
    };
    let mut examples = Vec::with_capacity(documents.report.tokens / length + 1);
    let mut segment = Vec::with_capacity(length);
    let mut tokens = 0;
    for document in documents.examples {
        let end = document
            .tokens
            .last()
            .is_none_or(|last| *last != eos)
            .then_some(eos);
        for token in document.tokens.into_iter().chain(end) {
            segment.push(token);
            tokens += 1;
            if segment.len() == length {
                let full = std::mem::replace(&mut segment, Vec::with_capacity(length));
                examples.push(Example::new(full, vec![true; length]));
            }
        }
    }
    if examples.is_empty() {
        return Err(Error::new(format!(
            "the text has {tokens} tokens, not enough for one segment of {length}"
        ))
        .hint("give more text, or shorter segments with `--length`"));
    }
    report.tokens = examples.len() * length;
    report.target_tokens = examples.len() * (length - 1);
    report.longest = length;
    Ok(Dataset { examples, report })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(texts: &[&[u32]]) -> Dataset {
        Dataset {
            examples: texts
                .iter()
                .map(|text| Example::new(text.to_vec(), vec![true; text.len()]))
                .collect(),
            ..Dataset::default()
        }
    }

    #[test]
    fn documents_run_on_across_segments() -> Result<()> {
        let packed = packed(documents(&[&[1, 2, 3], &[4, 0], &[5, 6]]), 4, 0)?;
        let tokens: Vec<_> = packed
            .examples
            .iter()
            .map(|example| example.tokens.clone())
            .collect();
        assert_eq!(tokens, [[1, 2, 3, 0], [4, 0, 5, 6]]);
        assert_eq!(packed.report.target_tokens, 6);
        assert_eq!(packed.examples[0].target_tokens(), 3);
        Ok(())
    }

    #[test]
    fn too_little_text_is_refused() {
        let error = packed(documents(&[&[1, 2]]), 4, 0)
            .expect_err("too short")
            .to_string();
        assert!(error.contains("3 tokens"), "{error}");
    }
}
