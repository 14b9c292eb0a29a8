//! The UNet as a chain of stages, which are run one at a time, observed, listed and replaced.

use std::collections::BTreeMap;

use sdxl_squeeze::Result;
use sdxl_squeeze::codebook::LayerKind;
use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::unet::{Conditioning, StageName, Unet, UnetChain};
use sdxl_squeeze::model::{Layer, LayerInput, Observer, Unobserved};
use sdxl_squeeze::pattern::NamePattern;
use sdxl_squeeze::pipeline::PipelineFolder;
use sdxl_squeeze::progress::Silent;
use sdxl_squeeze::random::noise;
use tch::{Device, Kind, Tensor};

use crate::support::emoji;

fn inputs(chain: &UnetChain, batch: i64, kind: Kind) -> (Tensor, Conditioning) {
    let config = chain.config();
    let random = |shape: &[i64]| noise(shape, shape.len() as u64, Kind::Float).unwrap().to_kind(kind);
    let ids = Tensor::from_slice(&[64f32, 64.0, 0.0, 0.0, 64.0, 64.0]).to_kind(kind);
    let pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim;
    let conditioning = Conditioning {
        encoder_hidden_states: random(&[batch, 77, config.cross_attention_dim]),
        text_embeds: random(&[batch, pooled]),
        time_ids: ids.unsqueeze(0).repeat([batch, 1]),
        timestep_cond: None,
    };
    (random(&[batch, 4, 16, 16]), conditioning)
}

/// Counts the calls of each layer and sums the inputs.
#[derive(Default)]
struct Seen(BTreeMap<String, (usize, f64)>);

impl Observer for Seen {
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()> {
        let width = match layer.kind() {
            LayerKind::Linear => *input.size().last().unwrap(),
            LayerKind::Conv2d => input.size()[1],
        };
        assert_eq!(width, layer.weight().size()[1], "{}", layer.name());
        let seen = self.0.entry(layer.name().to_owned()).or_default();
        *seen = (seen.0 + 1, input.to_kind(Kind::Double).sum(Kind::Double).double_value(&[]));
        Ok(())
    }
}

#[test]
fn stage_by_stage_equals_the_whole_bit_for_bit_and_watching_changes_nothing() {
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let weights = folder.unet_weights().unwrap();
    for kind in [Kind::Float, Kind::BFloat16] {
        let placement = Placement { kind, ..Placement::CPU };
        let whole = Unet::resident(folder.unet.clone(), weights.source(placement), &Silent).unwrap();
        let single = Unet::one_at_a_time(folder.unet.clone(), weights.source(placement)).unwrap();
        let (sample, conditioning) = inputs(&folder.unet, 2, kind);
        let expected = whole.forward(&sample, 321.0, &conditioning, &mut Unobserved).unwrap();
        assert_eq!(expected.kind(), kind);
        assert_eq!(single.forward(&sample, 321.0, &conditioning, &mut Unobserved).unwrap(), expected);

        let mut seen = Seen::default();
        assert_eq!(whole.forward(&sample, 321.0, &conditioning, &mut seen).unwrap(), expected);
        assert_eq!(seen.0.len(), 264);
        assert!(seen.0.values().all(|(times, sum)| *times == 1 && sum.is_finite()));

        let source = weights.source(placement);
        let mut carry =
            folder.unet.load_input_block(&source).unwrap().forward(&sample, 321.0, &conditioning, &mut Unobserved).unwrap();
        for spec in folder.unet.stages() {
            let stage = spec.load(&source).unwrap();
            // A carry can be used again, because a stage does not change its tensors.
            let first = stage.forward(carry.shallow_clone(), &mut Unobserved).unwrap();
            let second = stage.forward(carry, &mut Unobserved).unwrap();
            assert_eq!(first.hidden_states, second.hidden_states, "{}", spec.name());
            carry = second;
        }
        assert!(carry.down_block_res_samples.is_empty());
        assert_eq!(folder.unet.load_output_block(&source).unwrap().forward(&carry, &mut Unobserved).unwrap(), expected);
    }
}

#[test]
fn the_order_is_the_chains_and_patterns_match_whole_names() {
    let chain = PipelineFolder::open(&emoji()).unwrap().unet;
    let names: Vec<String> = chain.stages().iter().map(|stage| stage.name().to_string()).collect();
    let expected = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"];
    assert_eq!(names, expected);
    // The order of execution differs from the order of the patterns, and from the order of names in
    // a file, where `up_blocks` precede `mid_block`.
    let patterns = ["up_blocks.*", "mid_block", "down_blocks\\.2"].map(|p| NamePattern::parse(p).unwrap());
    let matched: Vec<StageName> = chain.matching(&patterns).map(|stage| stage.name()).collect();
    assert_eq!(matched, [StageName::Down(2), StageName::Mid, StageName::Up(0), StageName::Up(1), StageName::Up(2)]);
    let partial = [NamePattern::parse("down_blocks").unwrap()];
    assert_eq!(chain.matching(&partial).count(), 0);
}

#[test]
fn layers_are_listed_by_checkpoint_name_in_execution_order() {
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let source = weights.source(Placement::CPU);
    let stored: BTreeMap<&str, Vec<i64>> = weights.entries().map(|(name, entry)| (name, entry.shape.clone())).collect();

    struct Order(Vec<String>);
    impl Observer for Order {
        fn input(&mut self, layer: &Layer, _input: &Tensor) -> Result<()> {
            self.0.push(layer.name().to_owned());
            Ok(())
        }
    }
    let (sample, conditioning) = inputs(&folder.unet, 1, Kind::Float);
    let mut carry = folder.unet.load_input_block(&source).unwrap().forward(&sample, 1.0, &conditioning, &mut Unobserved).unwrap();
    for spec in folder.unet.stages() {
        let stage = spec.load(&source).unwrap();
        let mut order = Order(Vec::new());
        carry = stage.forward(carry, &mut order).unwrap();
        let listed: Vec<&str> = stage.layers().iter().map(Layer::name).collect();
        assert_eq!(listed, order.0);
        for layer in stage.layers() {
            assert_eq!(stored[format!("{}.weight", layer.name()).as_str()], layer.weight().size());
        }
    }
}

#[test]
fn a_weight_can_be_replaced_and_must_fit() {
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let source = weights.source(Placement::CPU);
    let (sample, conditioning) = inputs(&folder.unet, 1, Kind::Float);
    let carry = folder.unet.load_input_block(&source).unwrap().forward(&sample, 1.0, &conditioning, &mut Unobserved).unwrap();
    let mut stage = folder.unet.stages()[0].load(&source).unwrap();
    let before = stage.forward(carry.shallow_clone(), &mut Unobserved).unwrap().hidden_states;

    let layer = stage.layers_mut().iter_mut().find(|layer| layer.name() == "down_blocks.0.resnets.1.conv1").unwrap();
    let original = layer.weight().copy();
    layer.replace_weight(&(&original * 0.5)).unwrap();
    assert!(layer.replace_weight(&Tensor::zeros([1, 2], (Kind::Float, Device::Cpu))).is_err());
    assert_ne!(stage.forward(carry.shallow_clone(), &mut Unobserved).unwrap().hidden_states, before);

    let layer = stage.layers_mut().iter_mut().find(|layer| layer.name() == "down_blocks.0.resnets.1.conv1").unwrap();
    layer.replace_weight(&original).unwrap();
    assert_eq!(stage.forward(carry, &mut Unobserved).unwrap().hidden_states, before);
}

#[test]
fn an_observer_can_stop_a_forward() {
    struct Stop;
    impl Observer for Stop {
        fn input(&mut self, layer: &Layer, _input: &Tensor) -> Result<()> {
            Err(sdxl_squeeze::Error::NotFinite(format!("stopped at {}", layer.name())))
        }
    }
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let unet = Unet::one_at_a_time(folder.unet.clone(), weights.source(Placement::CPU)).unwrap();
    let (sample, conditioning) = inputs(&folder.unet, 1, Kind::Float);
    let stopped = unet.forward(&sample, 1.0, &conditioning, &mut Stop).unwrap_err();
    assert_eq!(stopped.to_string(), "stopped at time_embedding.linear_1");
}

/// The first tensor that was observed for each declared input, and the number of later layers that
/// had the same input.
#[derive(Default)]
struct Inputs {
    seen: BTreeMap<LayerInput, Tensor>,
    shared: usize,
}

impl Observer for Inputs {
    fn input(&mut self, layer: &Layer, input: &Tensor) -> Result<()> {
        match self.seen.get(layer.input()) {
            None => {
                self.seen.insert(layer.input().clone(), input.shallow_clone());
            }
            Some(first) => {
                // Each resnet computes the SiLU of the time embedding again, so these inputs are
                // equal but not identical.
                let same = first.data_ptr() == input.data_ptr() || (*layer.input() == LayerInput::Time && first == input);
                assert!(same, "{} says that it has {:?}", layer.name(), layer.input());
                self.shared += 1;
            }
        }
        Ok(())
    }
}

#[test]
fn layers_that_say_so_are_given_the_same_tensor() {
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let source = weights.source(Placement::CPU);
    let (sample, conditioning) = inputs(&folder.unet, 2, Kind::Float);
    let mut carry = folder.unet.load_input_block(&source).unwrap().forward(&sample, 7.0, &conditioning, &mut Unobserved).unwrap();
    let mut shape = folder.unet.first_carry(sample.size()[2], sample.size()[3]);
    let mut found = 0;
    for spec in folder.unet.stages() {
        let mut seen = Inputs::default();
        carry = spec.load(&source).unwrap().forward(carry, &mut seen).unwrap();
        found += seen.shared;
        // The inputs that layers declare as text and time come from the carry.
        if let Some(text) = seen.seen.get(&LayerInput::Text) {
            assert_eq!(*text, carry.encoder_hidden_states);
        }
        assert_eq!(seen.seen[&LayerInput::Time], carry.temb.silu());

        // The shapes are those that the chain computes without running the stage.
        shape = spec.after(&shape);
        assert_eq!(carry.hidden_states.size()[1..], shape.hidden_states, "{}", spec.name());
        let residuals: Vec<_> = carry.down_block_res_samples.iter().map(|residual| residual.size()[1..].to_vec()).collect();
        assert_eq!(residuals, shape.down_block_res_samples, "{}", spec.name());
    }
    let blocks = weights.entries().filter(|(name, _)| name.ends_with("attn1.to_q.weight")).count();
    // In each block four layers share an input with an earlier one: the keys and values of both
    // attentions. The first layers of each stage that get text and time do not count.
    assert!(found > 3 * blocks, "{found} for {blocks} blocks");
}

#[test]
fn narrow_weights_give_the_same_results_as_wide_ones() {
    let folder = PipelineFolder::open(&emoji()).unwrap();
    let weights = folder.unet_weights().unwrap();
    let (sample, conditioning) = inputs(&folder.unet, 1, Kind::Float);
    let run = |unet: Unet| unet.forward(&sample, 3.0, &conditioning, &mut Unobserved).unwrap();
    let wide = run(Unet::resident(folder.unet.clone(), weights.source(Placement::CPU), &Silent).unwrap());
    let narrow = run(Unet::resident(folder.unet.clone(), weights.narrow_source(Placement::CPU), &Silent).unwrap());
    assert_eq!(wide, narrow);
    assert_eq!(weights.narrow_bytes("conv_in.weight", Placement::CPU), Some(2), "the bundled model is stored in fp16");
}
