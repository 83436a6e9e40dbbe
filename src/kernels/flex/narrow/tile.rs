//! Some stored rows, and the memory that is fetched meanwhile.

use pulp::Simd;

use super::super::simd::fetch;
use super::LINE;

/// Some rows one behind the other, which are multiplied with all rows of floats before the next are.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, N> {
    pub numbers: &'a [N],
    pub width: usize,
    /// What each row's product is times. In sums the factors have it.
    pub scales: Option<&'a [f32]>,
    pub ahead: Ahead,
}

/// Memory that is fetched while a tile is gone through.
#[derive(Clone, Copy)]
pub(super) enum Ahead {
    Nothing,
    /// Some bytes for every [`AT_ONCE`](super::AT_ONCE) rows, one piece behind the other from a place that may be behind all there
    /// is.
    Tile {
        start: *const i8,
        bytes: usize,
    },
    /// What lies [`AHEAD`](super::AHEAD) of each line of a row.
    Lines,
}

impl Ahead {
    /// What is due with the tile's `block` of rows.
    #[inline(always)]
    pub fn fetch<S: Simd>(self, simd: S, block: usize) {
        if let Self::Tile { start, bytes } = self {
            let start = start.wrapping_add(block * bytes);
            for byte in (0..bytes).step_by(LINE) {
                fetch(simd, start.wrapping_add(byte));
            }
        }
    }

    /// What is left to fetch when a tile was gone through.
    #[inline(always)]
    pub fn once(self) -> Self {
        match self {
            Self::Tile { .. } => Self::Nothing,
            Self::Nothing | Self::Lines => self,
        }
    }
}
