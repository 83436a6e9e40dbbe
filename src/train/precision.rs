//! Numbers of half the bits: parameters may be, sums and updates must not.

pub(super) use crate::numbers::at_least_f32;
