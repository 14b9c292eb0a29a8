//! The width of a palette index.

use std::fmt::{self, Display};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Declares the widths in one list, which generates the enum, `ALL` and the numbers.
macro_rules! bit_widths {
    ($($width:ident = $bits:literal),+) => {
        /// Bits of a palette index: the widths for which Core ML has unsigned types. It is written
        /// as a number everywhere.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "u8", into = "u8")]
        pub enum BitWidth {
            $(#[doc = concat!(stringify!($bits), " bits.")] $width = $bits),+
        }

        impl BitWidth {
            /// All widths, ascending.
            pub const ALL: [BitWidth; [$($bits),+].len()] = [$(BitWidth::$width),+];
        }
    };
}

bit_widths!(One = 1, Two = 2, Three = 3, Four = 4, Six = 6, Eight = 8);

impl BitWidth {
    /// The number of bits.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self as u8
    }

    /// Entries of a palette with indices of this width: 2^bits.
    #[must_use]
    pub const fn entries(self) -> usize {
        1 << self.bits()
    }

    /// The largest index: 2^bits - 1.
    #[must_use]
    pub const fn max_index(self) -> u8 {
        u8::MAX >> (8 - self.bits())
    }

    /// The widths in words, with `conjunction` before the last: `1, 2, 3, 4, 6 or 8`.
    #[must_use]
    pub fn choices(conjunction: &str) -> String {
        let names = BitWidth::ALL.map(|width| width.to_string());
        let (last, others) = names.split_last().expect("there are widths");
        format!("{} {conjunction} {last}", others.join(", "))
    }
}

impl TryFrom<u8> for BitWidth {
    type Error = String;

    fn try_from(bits: u8) -> Result<Self, String> {
        let width = BitWidth::ALL.into_iter().find(|width| width.bits() == bits);
        width.ok_or_else(|| format!("{bits} bits are not supported ({} are)", BitWidth::choices("and")))
    }
}

impl From<BitWidth> for u8 {
    fn from(width: BitWidth) -> u8 {
        width.bits()
    }
}

impl FromStr for BitWidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bits: u8 = text.parse().map_err(|_| format!("`{text}` is not a number of bits"))?;
        BitWidth::try_from(bits)
    }
}

impl Display for BitWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Display::fmt(&self.bits(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_numbers_in_text_and_json() {
        for width in BitWidth::ALL {
            assert_eq!(width.to_string().parse(), Ok(width));
            assert_eq!(serde_json::to_string(&width).unwrap(), width.to_string());
            assert_eq!(serde_json::from_str::<BitWidth>(&width.to_string()).unwrap(), width);
            assert_eq!(width.entries(), 1 + usize::from(width.max_index()));
        }
        assert_eq!(BitWidth::ALL.map(BitWidth::bits), [1, 2, 3, 4, 6, 8]);
        assert_eq!(BitWidth::choices("or"), "1, 2, 3, 4, 6 or 8");
    }

    #[test]
    fn other_numbers_are_refused() {
        for bits in [0, 5, 7, 9, 16, 255] {
            assert!(BitWidth::try_from(bits).unwrap_err().starts_with(&format!("{bits} bits are not supported")));
            assert!(bits.to_string().parse::<BitWidth>().is_err());
            assert!(serde_json::from_str::<BitWidth>(&bits.to_string()).is_err());
        }
        assert!("four".parse::<BitWidth>().is_err());
    }
}
