//! What the tests of the operations share.
