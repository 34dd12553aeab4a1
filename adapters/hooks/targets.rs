//! Which layers a method acts on: PEFT's matching rules (`target_modules`, `exclude_modules`, `layers_to_transform`).

use crate::{Error, Result};
use regex::Regex;
use serde_json::{Value, json};
use std::fmt;
use std::str::FromStr;

/// A choice of modules by name, by pattern, or all linear ones.
#[derive(Debug, Clone)]
pub enum Targets {
    /// Every linear layer but the output head.
    AllLinear,
    /// Modules whose path is an entry or ends with `.` and an entry.
    Names(Vec<String>),
    /// Modules whose whole path matches.
    Pattern(Regex),
}

impl Targets {
    /// Whether the module at `path` is chosen. `is_head` keeps the output head out of [`Targets::AllLinear`].
    pub fn matches(&self, path: &str, is_head: bool) -> bool {
        match self {
            Self::AllLinear => !is_head,
            Self::Names(names) => names.iter().any(|name| ends_with_name(path, name)),
            Self::Pattern(pattern) => pattern.is_match(path),
        }
    }

    /// The entries that match none of `paths`, as they were written.
    pub fn unmatched(&self, paths: &[String]) -> Vec<String> {
        let matches_any = |test: &dyn Fn(&str) -> bool| paths.iter().any(|path| test(path));
        match self {
            Self::AllLinear => Vec::new(),
            Self::Names(names) => names
                .iter()
                .filter(|name| !matches_any(&|path| ends_with_name(path, name)))
                .cloned()
                .collect(),
            Self::Pattern(pattern) if matches_any(&|path| pattern.is_match(path)) => Vec::new(),
            Self::Pattern(_) => vec![self.to_string()],
        }
    }

    /// The value of `target_modules` or `exclude_modules`: a list, or a pattern as a string.
    pub fn to_peft(&self) -> Value {
        match self {
            Self::AllLinear => json!("all-linear"),
            Self::Names(names) => json!(names),
            Self::Pattern(_) => json!(self.to_string()),
        }
    }

    /// Reads `target_modules` or `exclude_modules`.
    pub fn from_peft(value: &Value) -> Result<Self> {
        match value {
            Value::String(text) if text == "all-linear" => Ok(Self::AllLinear),
            Value::String(text) => whole_path(text),
            Value::Array(entries) => entries
                .iter()
                .map(|entry| entry.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>()
                .map(Self::Names)
                .ok_or_else(|| {
                    Error::new(format!("expected a list of module names, found `{value}`"))
                }),
            _ => Err(Error::new(format!(
                "expected a list of module names or a pattern, found `{value}`"
            ))),
        }
    }
}

/// `all-linear`, a comma-separated list of names, or (when it holds a character that no module name has) a pattern.
impl FromStr for Targets {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.trim() == "all-linear" {
            return Ok(Self::AllLinear);
        }
        if text.contains(|character: char| r"\^$*+?()[]{}|".contains(character)) {
            return whole_path(text);
        }
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            return Err(Error::usage(format!("empty module name in `{text}`")));
        }
        // PEFT knows the word alone; in a list it would be a module's name.
        if names.iter().any(|name| name == "all-linear") {
            return Err(Error::usage(
                "`all-linear` stands alone, not among names: name every layer in its place",
            ));
        }
        Ok(Self::Names(names))
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AllLinear => formatter.write_str("all-linear"),
            Self::Names(names) => formatter.write_str(&names.join(",")),
            Self::Pattern(pattern) => {
                let text = pattern.as_str();
                formatter.write_str(
                    text.strip_prefix("^(?:")
                        .and_then(|text| text.strip_suffix(")$"))
                        .unwrap_or(text),
                )
            }
        }
    }
}

fn whole_path(pattern: &str) -> Result<Targets> {
    Regex::new(&format!("^(?:{pattern})$"))
        .map(Targets::Pattern)
        .map_err(|error| {
            Error::usage(format!("`{pattern}` is not a valid pattern: {error}"))
                .hint("a pattern must match the whole module path, such as `.*\\.(q|v)_proj`")
        })
}

fn ends_with_name(path: &str, name: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// Block numbers, written `0-3,7`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSelection(Vec<usize>);

impl LayerSelection {
    /// The selection of exactly these blocks.
    pub fn new(mut layers: Vec<usize>) -> Self {
        layers.sort_unstable();
        layers.dedup();
        Self(layers)
    }

    /// Whether block `layer` is selected.
    pub fn contains(&self, layer: usize) -> bool {
        self.0.binary_search(&layer).is_ok()
    }

    /// The selected blocks in ascending order.
    pub fn layers(&self) -> &[usize] {
        &self.0
    }
}

impl FromStr for LayerSelection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::usage(format!("`{text}` is not a list of blocks"))
                .hint("write block numbers from 0, such as `0-3,7`")
        };
        let mut layers = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.trim().parse().map_err(|_| wrong())?;
            let last: usize = last.trim().parse().map_err(|_| wrong())?;
            if first > last || last > 10_000 {
                return Err(wrong());
            }
            layers.extend(first..=last);
        }
        Ok(Self::new(layers))
    }
}

impl fmt::Display for LayerSelection {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.0.iter().map(usize::to_string).collect();
        formatter.write_str(&texts.join(","))
    }
}

/// Names among `known` that are near to `wanted`, nearest first: for hints.
pub fn suggest<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut near: Vec<(f64, &str)> = known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(wanted, name), name))
        .filter(|(nearness, _)| *nearness > 0.7)
        .collect();
    near.sort_by(|left, right| right.0.total_cmp(&left.0).then(left.1.cmp(right.1)));
    near.dedup_by(|left, right| left.1 == right.1);
    near.into_iter().map(|(_, name)| name).take(5).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn names_match_whole_path_components() {
        let targets: Targets = "q_proj, layers.1.mlp".parse().expect("names");
        assert!(targets.matches("model.layers.0.self_attn.q_proj", false));
        assert!(!targets.matches("model.layers.0.self_attn.kq_proj", false));
        assert!(targets.matches("model.layers.1.mlp", false));
        assert!(!targets.matches("model.layers.11.mlp", false));
    }

    #[test]
    fn a_pattern_matches_the_whole_path_and_reads_back() {
        let targets: Targets = r".*layers\.[01]\..*_proj".parse().expect("pattern");
        assert!(targets.matches("model.layers.1.self_attn.q_proj", false));
        assert!(!targets.matches("model.layers.2.self_attn.q_proj", false));
        assert_eq!(targets.to_string(), r".*layers\.[01]\..*_proj");
        assert!("(".parse::<Targets>().is_err());
    }

    #[test]
    fn layers_are_ranges_and_numbers() {
        let layers: LayerSelection = "4,0-2".parse().expect("layers");
        assert_eq!(layers.layers(), [0, 1, 2, 4]);
        assert!("3-1".parse::<LayerSelection>().is_err());
        assert!("".parse::<LayerSelection>().is_err());
    }

    #[test]
    fn near_names_are_suggested() {
        assert_eq!(
            suggest("q_prj", ["q_proj", "down_proj", "norm"])[0],
            "q_proj"
        );
    }

    fn paths() -> Vec<String> {
        ["model.layers.0.self_attn.q_proj", "lm_head"]
            .map(str::to_owned)
            .to_vec()
    }

    #[test]
    fn all_linear_is_every_layer_but_the_head() {
        let targets: Targets = "all-linear".parse().expect("a word");
        assert!(targets.matches("model.layers.0.self_attn.q_proj", false));
        assert!(!targets.matches("lm_head", true));
        assert!(targets.unmatched(&[]).is_empty());
        let padded: Targets = " all-linear ".parse().expect("a word");
        assert_eq!(padded.to_string(), "all-linear");
        for beside in ["all-linear,lm_head", "q_proj, all-linear"] {
            let error = beside.parse::<Targets>().expect_err(beside);
            assert_eq!(error.kind(), ErrorKind::Usage);
            assert!(error.to_string().contains("stands alone"), "{error}");
        }
    }

    #[test]
    fn what_matches_nothing_is_told_as_it_was_written() {
        let unmatched = |text: &str| text.parse::<Targets>().expect(text).unmatched(&paths());
        assert_eq!(unmatched("q_proj,k_proj,head"), ["k_proj", "head"]);
        assert_eq!(unmatched("q_proj,lm_head"), [""; 0]);
        assert_eq!(unmatched(".*_proj"), [""; 0]);
        assert_eq!(unmatched("_proj$"), ["_proj$"], "not the whole path");
    }

    #[test]
    fn pefts_words_are_read_and_written_alike() -> Result<()> {
        for (text, peft) in [
            ("all-linear", json!("all-linear")),
            ("q_proj,lm_head", json!(["q_proj", "lm_head"])),
            (r".*\.[qk]_proj", json!(r".*\.[qk]_proj")),
        ] {
            let targets: Targets = text.parse()?;
            assert_eq!(targets.to_peft(), peft);
            let read = Targets::from_peft(&peft)?;
            assert_eq!((read.to_string(), read.to_peft()), (text.to_owned(), peft));
            for path in paths() {
                let is_head = path == "lm_head";
                let expected = targets.matches(&path, is_head);
                assert_eq!(read.matches(&path, is_head), expected, "{text}: {path}");
            }
        }
        for wrong in [json!(1), json!(["q_proj", 1]), json!({}), json!("(")] {
            assert!(Targets::from_peft(&wrong).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn a_name_between_commas_is_not_empty() {
        for wrong in ["", "q_proj,", " ,q_proj"] {
            let error = wrong.parse::<Targets>().expect_err(wrong);
            assert_eq!(error.kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn a_selection_holds_its_blocks_in_order_and_once() {
        let layers = LayerSelection::new(vec![7, 1, 7]);
        assert_eq!(layers.layers(), [1, 7]);
        assert_eq!(layers.to_string(), "1,7");
        assert!(layers.contains(1) && layers.contains(7) && !layers.contains(2));
    }

    #[test]
    fn a_range_has_an_end_that_a_model_can_have() {
        for fine in ["3", "3-3", " 2 - 3 ", "10000"] {
            let layers: LayerSelection = fine.parse().expect(fine);
            assert!(layers.layers().len() <= 2, "{fine}");
        }
        for wrong in ["10001", "0-10001", "1-", "-1", "a"] {
            let error = wrong.parse::<LayerSelection>().expect_err(wrong);
            assert_eq!(error.kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn suggestions_come_once_and_nearest_first() {
        assert_eq!(
            suggest("q_prj", ["k_proj", "q_proj", "norm", "q_proj"]),
            ["q_proj", "k_proj"]
        );
        assert_eq!(suggest("q_prj", ["norm"]), [""; 0]);
        let many: Vec<String> = (0..9).map(|layer| format!("layer{layer}")).collect();
        assert_eq!(suggest("layer", many.iter().map(String::as_str)).len(), 5);
    }
}
