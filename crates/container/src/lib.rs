//! The file format of compressed UNets, without a tensor library. See [`container`].

pub mod container;
