//! One error type for both crates: a fact, a place and a way out.

use std::fmt;

/// The result of everything in retune that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, where, and what to do about it.
///
/// Messages are lower case without a full stop, with backticks round literals. `Display` prints the fact and its
/// place on one line; the hint is separate because a terminal shows it on a line of its own.
#[derive(Debug)]
pub struct Error {
    fact: String,
    place: Option<String>,
    hint: Option<String>,
    kind: ErrorKind,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

const GPU_MEMORY_USED_UP: &str = "the GPU's memory is used up";

/// What a caller may want to tell apart without reading the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request, a file or the machine is at fault: exit code 1.
    Failed,
    /// The command line does not make sense: exit code 2.
    Usage,
    /// A loss or a gradient is not finite: exit code 1.
    NotFinite,
    /// The user asked to stop, and everything was saved: exit code 130.
    Interrupted,
}

impl Error {
    /// An error that states `fact`.
    pub fn new(fact: impl Into<String>) -> Self {
        Self {
            fact: fact.into(),
            place: None,
            hint: None,
            kind: ErrorKind::Failed,
            source: None,
        }
    }

    /// A request that makes no sense as typed.
    pub fn usage(fact: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Usage,
            ..Self::new(fact)
        }
    }

    /// A run whose numbers are none any more.
    pub fn not_finite(fact: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::NotFinite,
            ..Self::new(fact)
        }
    }

    /// A GPU that has no more memory to give.
    pub fn out_of_gpu_memory() -> Self {
        Self::new(GPU_MEMORY_USED_UP).hint(
            "training and scoring need less with a lower `--tokens-per-pass`, training with `--recompute` and shorter \
             examples by `--max-length`, and everything with `--quantize nf4`",
        )
    }

    /// A run stopped on request.
    pub fn interrupted(fact: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Interrupted,
            ..Self::new(fact)
        }
    }

    /// Adds where it happened: a file, a line, a module path. The innermost place is kept.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.place.get_or_insert_with(|| place.to_string());
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn caused_by(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Wraps the error in the fact it led to, keeping hint and kind.
    #[must_use]
    pub fn context(self, fact: impl Into<String>) -> Self {
        Self {
            fact: fact.into(),
            place: None,
            hint: self.hint.clone(),
            kind: self.kind,
            source: Some(Box::new(Self { hint: None, ..self })),
        }
    }

    /// What to do about it, if known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// What a caller may want to tell apart.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(formatter, "{place}: {}", self.fact),
            None => formatter.write_str(&self.fact),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// What a driver says of kernels that candle was built with, and what to do.
const UNLOADABLE: [(&str, &str); 3] = [
    ("CUDA_ERROR_NO_BINARY_FOR_GPU", OTHER_GPU),
    ("CUDA_ERROR_INVALID_PTX", OTHER_GPU),
    (
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        "the driver is older than the CUDA toolkit: update the driver, or build with a toolkit of its version",
    ),
];
const OTHER_GPU: &str = "the program was built for another kind of GPU: build it with `CUDA_COMPUTE_CAP=80`, which newer ones run too";

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        // candle puts a backtrace into the message when one is switched on; users want the sentence.
        let text = error.to_string();
        // What our own operations say in a backward pass comes through candle as text, too.
        let used_up = ["CUDA_ERROR_OUT_OF_MEMORY", GPU_MEMORY_USED_UP];
        if used_up.iter().any(|said| text.contains(said)) {
            return Self::out_of_gpu_memory();
        }
        let sentence = text.lines().next().unwrap_or_default().to_owned();
        let error = Self::new(format!("tensor operation failed: {sentence}"));
        match UNLOADABLE.iter().find(|(said, _)| text.contains(said)) {
            Some((_, hint)) => error.hint(*hint),
            None => error,
        }
    }
}

/// Puts a place or a fact on any error on its way up.
pub trait Context<T> {
    /// Adds the file or module at which it happened.
    fn at(self, place: impl fmt::Display) -> Result<T>;
    /// Says what could not be done because of it.
    fn context(self, fact: impl Into<String>) -> Result<T>;
}

impl<T, E: IntoError> Context<T> for std::result::Result<T, E> {
    fn at(self, place: impl fmt::Display) -> Result<T> {
        self.map_err(|error| error.into_error().at(place))
    }

    fn context(self, fact: impl Into<String>) -> Result<T> {
        self.map_err(|error| error.into_error().context(fact))
    }
}

/// Errors of the libraries below, as ours.
pub trait IntoError {
    /// The same failure as a retune error.
    fn into_error(self) -> Error;
}

impl IntoError for Error {
    fn into_error(self) -> Error {
        self
    }
}

impl IntoError for candle_core::Error {
    fn into_error(self) -> Error {
        self.into()
    }
}

impl IntoError for std::io::Error {
    fn into_error(self) -> Error {
        let fact = match self.kind() {
            std::io::ErrorKind::NotFound => "no such file or folder".to_owned(),
            std::io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            std::io::ErrorKind::StorageFull => "the disk is full".to_owned(),
            _ => self.to_string(),
        };
        let error = Error::new(fact);
        match self.kind() {
            std::io::ErrorKind::StorageFull => error
                .hint("free some space and run the command again; nothing half-written was left"),
            _ => error,
        }
    }
}

impl IntoError for serde_json::Error {
    fn into_error(self) -> Error {
        Error::new(format!("not valid JSON: {}", json_fault(&self)))
    }
}

/// What is wrong with a JSON text, in serde_json's words but for those that name the cause badly.
pub fn json_fault(error: &serde_json::Error) -> String {
    const HALF: &str = "half of a character: a surrogate such as `\\ud83d` without its other half";
    let said = error.to_string();
    [
        "unexpected end of hex escape",
        "lone leading surrogate in hex escape",
    ]
    .iter()
    .fold(said, |said, theirs| said.replace(theirs, HALF))
}

impl IntoError for safetensors::SafeTensorError {
    fn into_error(self) -> Error {
        Error::new(format!("not a valid safetensors file: {self}")).hint(
            "the file may be truncated: compare its size with the original, or download it again",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;
    use std::io;

    #[test]
    fn a_gpu_without_memory_is_told_with_a_way_out() {
        let refused = "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")";
        for error in [
            candle_core::Error::msg(refused),
            // As the backward of an operation of ours hands it to candle.
            candle_core::Error::wrap(Error::out_of_gpu_memory()),
        ] {
            let error = Error::from(error);
            assert_eq!(error.to_string(), "the GPU's memory is used up");
            assert!(
                error
                    .hint_text()
                    .is_some_and(|hint| hint.contains("--recompute"))
            );
        }
    }

    #[test]
    fn kernels_that_a_driver_does_not_take_are_told_with_a_way_out() {
        for (said, way_out) in [
            ("CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_COMPUTE_CAP=80"),
            ("CUDA_ERROR_INVALID_PTX", "CUDA_COMPUTE_CAP=80"),
            ("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "update the driver"),
        ] {
            let refused = format!("DriverError({said}, \"refused\")");
            let error = Error::from(candle_core::Error::msg(refused));
            assert!(error.to_string().contains(said), "{error}");
            let hint = error.hint_text().unwrap_or_default();
            assert!(hint.contains(way_out), "{hint}");
        }
    }

    #[test]
    fn each_way_to_fail_has_its_kind_whatever_follows() {
        for (error, kind) in [
            (Error::new("fact"), ErrorKind::Failed),
            (Error::usage("fact"), ErrorKind::Usage),
            (Error::not_finite("fact"), ErrorKind::NotFinite),
            (Error::interrupted("fact"), ErrorKind::Interrupted),
        ] {
            assert_eq!(error.to_string(), "fact");
            assert_eq!(error.kind(), kind);
            assert_eq!(error.context("what followed").kind(), kind);
        }
    }

    #[test]
    fn the_innermost_place_is_kept() {
        let error = Error::new("fact").at("a.json").at("folder");
        assert_eq!(error.to_string(), "a.json: fact");
    }

    #[test]
    fn a_context_says_the_hint_once_and_keeps_its_cause() {
        let cause = Error::new("fact").at("a.json").hint("a way out");
        let error = cause.context("what followed");
        assert_eq!(error.to_string(), "what followed");
        assert_eq!(error.hint_text(), Some("a way out"));
        let cause: &Error = error
            .source()
            .and_then(|cause| cause.downcast_ref())
            .expect("the cause");
        assert_eq!(cause.to_string(), "a.json: fact");
        assert_eq!(cause.hint_text(), None);
        assert!(cause.source().is_none());
    }

    #[test]
    fn a_cause_may_be_any_error() {
        let error = Error::new("fact").caused_by(io::Error::other("the cable is out"));
        let cause = error.source().expect("the cause");
        assert_eq!(cause.to_string(), "the cable is out");
    }

    #[test]
    fn the_systems_errors_are_told_in_plain_words() {
        for (kind, fact) in [
            (io::ErrorKind::NotFound, "no such file or folder"),
            (io::ErrorKind::PermissionDenied, "permission denied"),
            (io::ErrorKind::StorageFull, "the disk is full"),
            (io::ErrorKind::Other, "the system's words"),
        ] {
            let error = io::Error::new(kind, "the system's words").into_error();
            assert_eq!(error.to_string(), fact);
            let full = kind == io::ErrorKind::StorageFull;
            assert_eq!(error.hint_text().is_some(), full, "{fact}");
        }
    }

    #[test]
    fn a_tensors_error_is_its_first_line() {
        let error: Error = candle_core::Error::Msg("shapes differ\n   0: main".to_owned()).into();
        assert_eq!(error.to_string(), "tensor operation failed: shapes differ");
        assert_eq!(error.hint_text(), None);
        let full = candle_core::Error::Msg("CUDA_ERROR_OUT_OF_MEMORY".to_owned());
        assert!(full.into_error().hint_text().is_some());
    }

    #[test]
    fn half_a_character_in_json_is_called_that() {
        for text in [r#""\ud83d""#, r#""\ud83d\u0041""#] {
            let fault = serde_json::from_str::<String>(text).expect_err("half a character");
            let error = fault.into_error().to_string();
            assert!(
                error.starts_with("not valid JSON: half of a character"),
                "{error}"
            );
        }
        let fault = serde_json::from_str::<String>("\"").expect_err("no end");
        assert!(
            json_fault(&fault).starts_with("EOF while parsing"),
            "{fault}"
        );
    }
}
