//! The values of GGUF's metadata.

/// A value of a key.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufValue {
    /// A u8, u16, u32 or u64.
    Unsigned(u64),
    /// An i8, i16, i32 or i64.
    Signed(i64),
    /// An f32 or f64.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Several values of one kind.
    Array(GgufArray),
}

impl GgufValue {
    /// A whole number that is not negative.
    pub fn as_unsigned(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(number) => Some(number),
            Self::Signed(number) => number.try_into().ok(),
            _ => None,
        }
    }

    /// A number of any kind.
    pub fn as_number(&self) -> Option<f64> {
        match *self {
            Self::Unsigned(number) => Some(number as f64),
            Self::Signed(number) => Some(number as f64),
            Self::Float(number) => Some(number),
            _ => None,
        }
    }

    /// True or false.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(flag) => Some(flag),
            _ => None,
        }
    }

    /// A text.
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Several values.
    pub fn as_array(&self) -> Option<&GgufArray> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }

    /// The value for a message, cut short.
    pub(super) fn shown(&self) -> String {
        let mut text = match self {
            Self::Unsigned(number) => number.to_string(),
            Self::Signed(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Bool(flag) => flag.to_string(),
            Self::Text(text) => format!("{text:?}"),
            Self::Array(array) => format!("an array of {} values", array.len()),
        };
        if let Some((end, _)) = text.char_indices().nth(60) {
            text.truncate(end);
            text.push('…');
        }
        text
    }
}

/// Several values of one kind.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufArray {
    /// Texts.
    Texts(Vec<String>),
    /// Numbers or flags, kept as they are in the file.
    Numbers(GgufNumbers),
    /// Arrays, of whatever kind each.
    Arrays(Vec<GgufArray>),
}

impl GgufArray {
    /// How many values it has.
    pub fn len(&self) -> usize {
        match self {
            Self::Texts(texts) => texts.len(),
            Self::Numbers(numbers) => numbers.len(),
            Self::Arrays(arrays) => arrays.len(),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Numbers of one type in as much memory as they take in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufNumbers {
    pub(super) kind: Kind,
    pub(super) bytes: Vec<u8>,
}

impl GgufNumbers {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.bytes()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The numbers in order, each as a value of its own.
    pub fn iter(&self) -> impl Iterator<Item = GgufValue> + '_ {
        let numbers = self.bytes.chunks_exact(self.kind.bytes());
        numbers.map(|bytes| self.kind.read(bytes))
    }
}

/// The type of a number in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl Kind {
    /// By its number in files; texts are 8 and arrays 9.
    pub fn of(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    pub fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// From as many little-endian bytes as it has.
    pub fn read(self, bytes: &[u8]) -> GgufValue {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(wide);
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => GgufValue::Unsigned(bits),
            Self::I8 => GgufValue::Signed((bits as i8).into()),
            Self::I16 => GgufValue::Signed((bits as i16).into()),
            Self::I32 => GgufValue::Signed((bits as i32).into()),
            Self::I64 => GgufValue::Signed(bits as i64),
            Self::F32 => GgufValue::Float(f32::from_bits(bits as u32).into()),
            Self::F64 => GgufValue::Float(f64::from_bits(bits)),
            Self::Bool => GgufValue::Bool(bits != 0),
        }
    }
}
