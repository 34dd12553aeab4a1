//! The command line: the only folder that prints or reads the environment.

pub mod progress;
pub mod table;
