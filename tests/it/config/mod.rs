//! Run configs: mistakes and their places, the precedence of rules, and the shipped configs.

mod mistakes;
mod overrides;
mod reference;
mod resolution;
mod round_trip;
mod shipped;

use std::path::Path;

use sdxl_squeeze::Error;
use sdxl_squeeze::codebook::LayerKind;
use sdxl_squeeze::config::{LayerInfo, Mistake, Place, RunConfig};

/// Parses a config that has no mistakes.
fn parsed(yaml: &str) -> RunConfig {
    RunConfig::parse(Path::new("x.yaml"), yaml.as_bytes()).unwrap_or_else(|why| panic!("{why}\n{yaml}"))
}

fn mistakes_of(error: Error) -> Vec<Mistake> {
    assert!(error.is_bad_input());
    let shown = error.to_string();
    let Error::Config { mistakes } = error else { panic!("{error}") };
    assert_eq!(shown.lines().count(), mistakes.len(), "a line for each mistake: {shown}");
    mistakes
}

/// The places and the problems of a config that has mistakes.
fn refused(yaml: impl AsRef<[u8]>) -> Vec<(u64, u64, String)> {
    let yaml = yaml.as_ref();
    let Err(error) = RunConfig::parse(Path::new("x.yaml"), yaml) else {
        panic!("accepted:\n{}", String::from_utf8_lossy(yaml));
    };
    let mistakes = mistakes_of(error).into_iter().map(|mistake| match mistake.place {
        Place::File { path, line, column } => {
            assert_eq!(path, Path::new("x.yaml"));
            (line, column, mistake.problem)
        }
        other => panic!("{other:?}"),
    });
    mistakes.collect()
}

fn layer(name: &str, module_type: LayerKind, shape: &[i64]) -> LayerInfo {
    let stage = match name.split('.').collect::<Vec<_>>()[..] {
        ["mid_block", ..] => Some("mid_block".to_owned()),
        [blocks @ ("down_blocks" | "up_blocks"), index, ..] => Some(format!("{blocks}.{index}")),
        _ => None,
    };
    LayerInfo { name: name.to_owned(), stage, module_type, shape: shape.to_vec() }
}
