/// What the caller of long work wants after each part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// That was enough: keep what there is and stop.
    Stop,
}
