//! The parameters of an operation.

use std::collections::BTreeMap;

use super::element::{ArrayType, Element};
use super::literal::Literal;

/// A value that an operation can read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Operand {
    /// Its type.
    pub array: ArrayType,
    /// Its value, if the program contains it as a literal.
    pub literal: Option<Literal>,
    /// Whether it is known before the program runs: constants, and the outputs of `constexpr`
    /// operations.
    pub constant: bool,
    /// The number of set bits of a mask, if they have been counted.
    pub ones: Option<u64>,
}

impl Operand {
    /// A value that the program computes.
    pub(crate) fn computed(array: ArrayType) -> Self {
        Operand { array, literal: None, constant: false, ones: None }
    }
}

/// An operation's parameters by name; only `values` has more than one operand.
#[derive(Debug, Default)]
pub(super) struct Operands<'a>(pub BTreeMap<&'a str, Vec<&'a Operand>>);

impl<'a> Operands<'a> {
    pub(crate) fn one(&self, name: &str) -> Result<&'a Operand, String> {
        match self.0.get(name).map(Vec::as_slice) {
            Some([operand]) => Ok(operand),
            Some(_) => Err(format!("`{name}` is not one value")),
            None => Err(format!("`{name}` is missing")),
        }
    }

    pub(crate) fn array(&self, name: &str) -> Result<&'a ArrayType, String> {
        Ok(&self.one(name)?.array)
    }

    pub(crate) fn shape(&self, name: &str) -> Result<&'a [u64], String> {
        Ok(&self.array(name)?.shape)
    }

    pub(crate) fn list(&self, name: &str) -> Result<&[&'a Operand], String> {
        self.0.get(name).map(Vec::as_slice).ok_or_else(|| format!("`{name}` is missing"))
    }

    fn literal(&self, name: &str) -> Result<&'a Literal, String> {
        self.one(name)?.literal.as_ref().ok_or_else(|| format!("`{name}` is not a value that stands in the program"))
    }

    pub(crate) fn int(&self, name: &str) -> Result<i32, String> {
        match self.literal(name)? {
            Literal::Int(value) => Ok(*value),
            literal => Err(format!("`{name}` is {}, not an int32", literal.array_type())),
        }
    }

    pub(crate) fn ints(&self, name: &str) -> Result<&'a [i32], String> {
        match self.literal(name)? {
            Literal::Ints(values) => Ok(values),
            literal => Err(format!("`{name}` is {}, not a list of int32", literal.array_type())),
        }
    }

    /// Integers that are sizes: positive.
    pub(crate) fn sizes(&self, name: &str) -> Result<Vec<u64>, String> {
        let size = |n: &i32| u64::try_from(*n).ok().filter(|n| *n > 0);
        self.ints(name)?.iter().map(size).collect::<Option<_>>().ok_or_else(|| format!("`{name}` has a size below 1"))
    }

    pub(crate) fn bool(&self, name: &str) -> Result<bool, String> {
        match self.literal(name)? {
            Literal::Bool(value) => Ok(*value),
            literal => Err(format!("`{name}` is {}, not a bool", literal.array_type())),
        }
    }

    pub(crate) fn bools(&self, name: &str) -> Result<&'a [bool], String> {
        match self.literal(name)? {
            Literal::Bools(values) => Ok(values),
            literal => Err(format!("`{name}` is {}, not a list of bools", literal.array_type())),
        }
    }

    pub(crate) fn float(&self, name: &str) -> Result<f32, String> {
        match self.literal(name)? {
            Literal::Float(value) => Ok(*value),
            literal => Err(format!("`{name}` is {}, not an fp32", literal.array_type())),
        }
    }

    pub(crate) fn text(&self, name: &str) -> Result<&'a str, String> {
        match self.literal(name)? {
            Literal::Text(text) => Ok(text),
            literal => Err(format!("`{name}` is {}, not a string", literal.array_type())),
        }
    }

    /// A small positive scalar of the dtype of `x`.
    pub(crate) fn epsilon(&self, name: &str, element: Element) -> Result<(), String> {
        let value = match (self.literal(name)?, element) {
            (Literal::Half(value), Element::F16) => value.to_f32(),
            (Literal::Float(value), Element::F32) => *value,
            (literal, _) => return Err(format!("`{name}` is {}, where {element} is needed", literal.array_type())),
        };
        if value > 0.0 && value < 1.0 { Ok(()) } else { Err(format!("`{name}` is {value}")) }
    }

    /// A constant vector of a given length and the dtype of `x`.
    pub(crate) fn vector(&self, name: &str, element: Element, length: u64) -> Result<(), String> {
        let operand = self.one(name)?;
        if !operand.constant {
            return Err(format!("`{name}` is not a constant"));
        }
        let wanted = ArrayType::new(element, [length]);
        if operand.array == wanted { Ok(()) } else { Err(format!("`{name}` is {}, not {wanted}", operand.array)) }
    }
}
