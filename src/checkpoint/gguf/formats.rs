//! ggml's number formats, each widened to f32 as the Python package `gguf` does it: the same
//! operations in the same order, so that every bit is the same.
//!
//! A row is cut into blocks of 32 or 256 numbers that share scales. Layouts: `ggml-common.h` of
//! llama.cpp.

use burn::tensor::f16;

/// A format of numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    /// Its number in files.
    pub id: u32,
    pub name: &'static str,
    /// Numbers in a block.
    pub block: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// Appends the numbers of whole blocks.
    pub decode: fn(&[u8], &mut Vec<f32>),
}

/// The formats that are read.
pub(super) static FORMATS: [Format; 11] = [
    format(0, "F32", 1, 4, f32),
    format(1, "F16", 1, 2, half),
    format(30, "BF16", 1, 2, bf16),
    format(8, "Q8_0", 32, 34, q8_0),
    format(2, "Q4_0", 32, 18, q4_0),
    format(3, "Q4_1", 32, 20, q4_1),
    format(6, "Q5_0", 32, 22, q5_0),
    format(7, "Q5_1", 32, 24, q5_1),
    format(12, "Q4_K", 256, 144, q4_k),
    format(13, "Q5_K", 256, 176, q5_k),
    format(14, "Q6_K", 256, 210, q6_k),
];

/// The names of those that are not.
const OTHERS: [(u32, &str); 25] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (4, "Q4_2"),
    (5, "Q4_3"),
];

const fn format(
    id: u32,
    name: &'static str,
    block: usize,
    bytes: usize,
    decode: fn(&[u8], &mut Vec<f32>),
) -> Format {
    Format {
        id,
        name,
        block,
        bytes,
        decode,
    }
}

impl Format {
    pub fn of(id: u32) -> Option<&'static Self> {
        FORMATS.iter().find(|format| format.id == id)
    }

    /// The names of all formats.
    pub fn known() -> String {
        FORMATS.map(|format| format.name).join(", ")
    }

    /// A format that is not read, for a message.
    pub fn unknown(id: u32) -> String {
        match OTHERS.iter().find(|(other, _)| *other == id) {
            Some((_, name)) => format!("{name} ({id})"),
            None => id.to_string(),
        }
    }
}

fn f32(bytes: &[u8], out: &mut Vec<f32>) {
    let numbers = bytes.as_chunks().0;
    out.extend(numbers.iter().map(|&bytes| f32::from_le_bytes(bytes)));
}

fn half(bytes: &[u8], out: &mut Vec<f32>) {
    let numbers = bytes.as_chunks().0;
    out.extend(
        numbers
            .iter()
            .map(|&bytes| f16::from_le_bytes(bytes).to_f32()),
    );
}

fn bf16(bytes: &[u8], out: &mut Vec<f32>) {
    let numbers = bytes.as_chunks().0;
    let widen = |&bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
    out.extend(numbers.iter().map(widen));
}

/// A scale, an f16 at `start`.
fn scale(block: &[u8], start: usize) -> f32 {
    f16::from_le_bytes([block[start], block[start + 1]]).to_f32()
}

/// The low half of every byte, then the high one.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let low = bytes.iter().map(|byte| byte & 0xf);
    low.chain(bytes.iter().map(|byte| byte >> 4))
}

fn q8_0(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<34>().0 {
        let d = scale(block, 0);
        out.extend(block[2..].iter().map(|&q| f32::from(q as i8) * d));
    }
}

fn q4_0(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<18>().0 {
        let d = scale(block, 0);
        out.extend(nibbles(&block[2..]).map(|q| d * f32::from(q as i8 - 8)));
    }
}

fn q4_1(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<20>().0 {
        let (d, m) = (scale(block, 0), scale(block, 2));
        out.extend(nibbles(&block[4..]).map(|q| d * f32::from(q) + m));
    }
}

/// Numbers of 5 bits: their low 4, and a word of the highest ones.
fn five_bits<'b>(low: &'b [u8], high: &[u8]) -> impl Iterator<Item = u8> + use<'b> {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    nibbles(low)
        .enumerate()
        .map(move |(i, q)| q | ((high >> i & 1) as u8) << 4)
}

fn q5_0(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<22>().0 {
        let d = scale(block, 0);
        let numbers = five_bits(&block[6..], &block[2..6]);
        out.extend(numbers.map(|q| d * f32::from(q as i8 - 16)));
    }
}

fn q5_1(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<24>().0 {
        let (d, m) = (scale(block, 0), scale(block, 2));
        let numbers = five_bits(&block[8..], &block[4..8]);
        out.extend(numbers.map(|q| d * f32::from(q) + m));
    }
}

/// Scale and minimum of part `i` of 8, 6 bits each in 12 bytes: those of the first four parts are
/// in the low bits of bytes 0..4 and 4..8, the high bits of which belong to the last four.
fn part_scales(scales: &[u8], i: usize) -> (f32, f32) {
    let (d, m) = match i {
        0..4 => (scales[i] & 63, scales[i + 4] & 63),
        _ => {
            let both = scales[i + 4];
            (
                both & 0xf | scales[i - 4] >> 2 & 0x30,
                both >> 4 | scales[i] >> 2 & 0x30,
            )
        }
    };
    (d.into(), m.into())
}

fn q4_k(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<144>().0 {
        let (d, min) = (scale(block, 0), scale(block, 2));
        // 64 numbers at a time: 32 low halves are a part, the high ones the next.
        for (pair, bytes) in block[16..].chunks_exact(32).enumerate() {
            for high in 0..2 {
                let (part_d, part_m) = part_scales(&block[4..16], 2 * pair + high);
                let (d, m) = (d * part_d, min * part_m);
                let numbers = bytes.iter().map(|byte| byte >> (4 * high) & 0xf);
                out.extend(numbers.map(|q| d * f32::from(q) - m));
            }
        }
    }
}

fn q5_k(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<176>().0 {
        let (d, min) = (scale(block, 0), scale(block, 2));
        let highest = &block[16..48];
        for (pair, bytes) in block[48..].chunks_exact(32).enumerate() {
            for high in 0..2 {
                let part = 2 * pair + high;
                let (part_d, part_m) = part_scales(&block[4..16], part);
                let (d, m) = (d * part_d, min * part_m);
                let numbers = bytes
                    .iter()
                    .zip(highest)
                    .map(|(byte, highest)| byte >> (4 * high) & 0xf | (highest >> part & 1) << 4);
                out.extend(numbers.map(|q| d * f32::from(q) - m));
            }
        }
    }
}

fn q6_k(bytes: &[u8], out: &mut Vec<f32>) {
    for block in bytes.as_chunks::<210>().0 {
        let (low, high) = (&block[..128], &block[128..192]);
        let scales = &block[192..208];
        let d = scale(block, 208);
        for (part, scale) in scales.iter().enumerate() {
            let d = d * f32::from(*scale as i8);
            for i in 16 * part..16 * part + 16 {
                // Halves of 128 numbers, in each of which a byte of `low` has numbers 64 apart and
                // a byte of `high` four that are 32 apart.
                let (half, within) = (i / 128, i % 128);
                let low = low[64 * half + within % 64] >> (4 * (within / 64)) & 0xf;
                let high = high[32 * half + within % 32] >> (2 * (within / 32)) & 3;
                out.push(d * f32::from((low | high << 4) as i8 - 32));
            }
        }
    }
}
