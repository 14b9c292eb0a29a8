//! The vocabulary of compressed weights. See [`codebook`].

pub mod codebook;
