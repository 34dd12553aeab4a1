//! Differentiable operations, each with a hand-written backward.
