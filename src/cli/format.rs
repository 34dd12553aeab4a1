//! Numbers for people (to be replaced).

pub(super) fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}
