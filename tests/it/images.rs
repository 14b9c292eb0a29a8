//! Pictures as inputs against diffusers: the VAE's encoder, image to image, inpainting, editing;
//! and how prompts are read.

use std::path::Path;

use sdxl_squeeze::device::Placement;
use sdxl_squeeze::model::vae::VaeEncoder;
use sdxl_squeeze::picture::Picture;
use sdxl_squeeze::pipeline::{
    GenerateRequest, Generated, Guidance, ImageRequest, Mask, PipelineFolder, PromptEncoder, PromptOptions, decode_with,
    generate, load_vae,
};
use sdxl_squeeze::progress::Silent;
use tch::{Kind, Tensor};

use crate::architectures::{GUIDANCE, PROMPT, SEED, STEPS, checker, golden, pipeline};
use crate::squeeze::Squeeze;
use crate::support::{relative_error, repo};

fn request(image: Option<ImageRequest>) -> GenerateRequest {
    GenerateRequest {
        prompt: PROMPT.into(),
        negative_prompt: None,
        seed: SEED,
        steps: STEPS,
        guidance: GUIDANCE,
        guidance_rescale: 0.0,
        size: None,
        original_size: None,
        target_size: None,
        scheduler: None,
        timestep_spacing: None,
        eta: 0.0,
        low_memory: false,
        unet: None,
        unverified: false,
        prompts: PromptOptions::default(),
        image,
    }
}

/// The golden picture, with a strength, and with the golden mask.
fn image(strength: Option<f64>, masked: bool) -> Option<ImageRequest> {
    let picture = Picture::read_png(&golden("image.png")).unwrap();
    let mask = masked.then(|| Mask::read_png(&golden("mask.png")).unwrap());
    Some(ImageRequest { picture, mask, strength, guidance: None })
}

fn draw(folder: &PipelineFolder, request: &GenerateRequest) -> Generated {
    generate(folder, request, Placement::CPU, &Silent).unwrap()
}

/// The picture before it is rounded to bytes, in [0, 1].
fn unit(folder: &PipelineFolder, generated: &Generated) -> Tensor {
    let vae = load_vae(folder, Placement::CPU).unwrap();
    Picture::to_unit(&vae.forward(&vae.unscale(&generated.latents).unwrap()).unwrap()).unwrap()
}

#[test]
fn architectures_draw_as_in_diffusers() {
    let root = tempfile::tempdir().unwrap();
    for name in ["ssd-like", "koala-like", "lcm-like"] {
        let mut check = checker(&format!("{name}/reference.safetensors"));
        let folder = PipelineFolder::open(&pipeline(name, root.path())).unwrap();
        let drawn = draw(&folder, &request(None));
        check.close("final_latents", &drawn.latents);
        check.close("image", &unit(&folder, &drawn));
        check.close("noguidance/final_latents", &draw(&folder, &GenerateRequest { guidance: 1.0, ..request(None) }).latents);
        check.finish(name, |key| key.starts_with("unet@") || key == "timestep_cond");
    }
}

#[test]
fn inpainting_models_draw_as_in_diffusers() {
    let root = tempfile::tempdir().unwrap();
    let mut check = checker("inpainting-like/reference.safetensors");
    let folder = PipelineFolder::open(&pipeline("inpainting-like", root.path())).unwrap();
    for (key, strength) in [("0.9999", None), ("1.0", Some(1.0)), ("0.6", Some(0.6))] {
        let drawn = draw(&folder, &request(image(strength, true)));
        check.close(&format!("strength@{key}/final_latents"), &drawn.latents);
        check.close(&format!("strength@{key}/image"), &unit(&folder, &drawn));
    }
    let alone = GenerateRequest { guidance: 1.0, ..request(image(Some(1.0), true)) };
    check.close("noguidance/final_latents", &draw(&folder, &alone).latents);
    check.finish("inpainting-like", |key| key.starts_with("unet@"));
}

/// Latents of InstructPix2Pix's kind are not scaled; those of CosXL are, also without guidance.
#[test]
fn edit_models_draw_as_in_diffusers() {
    let root = tempfile::tempdir().unwrap();
    let mut check = checker("edit-like/reference.safetensors");
    let mut folder = PipelineFolder::open(&pipeline("edit-like", root.path())).unwrap();
    for (key, is_cosxl) in [("", false), ("cosxl/", true)] {
        folder.is_cosxl_edit = is_cosxl;
        let drawn = draw(&folder, &request(image(None, false)));
        check.close(&format!("{key}final_latents"), &drawn.latents);
        check.close(&format!("{key}image"), &unit(&folder, &drawn));
    }
    let alone = GenerateRequest { guidance: 1.0, ..request(image(None, false)) };
    check.close("noguidance/final_latents", &draw(&folder, &alone).latents);
    check.finish("edit-like", |key| key.starts_with("unet@"));
}

/// Also with the latents of a VAE that has means and deviations, and with a refiner's scores.
#[test]
fn image_to_image_equals_diffusers() {
    let mut check = checker("pictures.safetensors");
    for name in ["base-like", "refiner-like", "v-prediction"] {
        let folder = PipelineFolder::open(&repo("tests/golden").join(name)).unwrap();
        let weights = folder.vae_weights().unwrap();
        let encoder = VaeEncoder::load(&folder.vae, &weights.source(Placement::CPU)).unwrap();
        let latents = encoder.forward(&image(None, false).unwrap().picture.to_tensor().unwrap()).unwrap();
        check.close(&format!("{name}/mean"), &latents.mean);
        check.close(&format!("{name}/std"), &latents.std);
        for scheduler in ["euler", "ddim", "dpmpp-2m"] {
            for (key, strength) in [("0.3", None), ("0.75", Some(0.75)), ("1.0", Some(1.0))] {
                let request = GenerateRequest { scheduler: Some(scheduler.into()), ..request(image(strength, false)) };
                let drawn = draw(&folder, &request);
                check.close(&format!("{name}/{scheduler}@{key}/final_latents"), &drawn.latents);
                if (scheduler, key) == ("euler", "0.75") {
                    check.close(&format!("{name}/{scheduler}@{key}/image"), &unit(&folder, &drawn));
                }
            }
        }
    }
    let folder = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    for (key, strength) in [("0.7", 0.7), ("1.0", 1.0)] {
        let drawn = draw(&folder, &request(image(Some(strength), true)));
        check.close(&format!("base-like/mask@{key}/final_latents"), &drawn.latents);
    }
    let options = PromptOptions { clip_skip: 1, ..PromptOptions::default() };
    let encoder = PromptEncoder::load(&folder, Placement::CPU).unwrap().with_options(options);
    let guidance = Guidance::encode(&encoder, &folder, PROMPT, None, 1.0, (64, 64)).unwrap();
    check.close("base-like/clip_skip@1/prompt_embeds", &guidance.conditioning.encoder_hidden_states);
    check.finish("pictures", |_| false);
}

#[test]
fn a_picture_is_read_as_it_was_written() {
    let folder = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    let vae = load_vae(&folder, Placement::CPU).unwrap();
    let drawn = draw(&folder, &request(None));
    let again = decode_with(&vae, &drawn.latents).unwrap();
    assert_eq!(again, drawn.picture);
    let (path, kept) = (tempfile::tempdir().unwrap(), &drawn.picture);
    let png = path.path().join("x.png");
    kept.write_png(&png, &[]).unwrap();
    assert_eq!(&Picture::read_png(&png).unwrap(), kept);
}

fn generating(model: &Path) -> Squeeze {
    Squeeze::new("generate").model(model).args(["--prompt", "a cat", "--steps", "4", "-o", "/dev/null"])
}

#[test]
fn what_a_model_cannot_do_with_a_picture_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let base = generating(&repo("tests/golden/base-like"));
    let (picture, mask) = (golden("image.png"), golden("mask.png"));
    let inpainting = generating(&pipeline("inpainting-like", root.path()));
    let edit = generating(&pipeline("edit-like", root.path()));
    inpainting.is_refused(&["an inpainting model needs --image and --mask"]);
    inpainting.clone().with("--image", &picture).is_refused(&["needs --image and --mask"]);
    edit.is_refused(&["an edit model needs --image"]);
    let edit = edit.with("--image", &picture);
    edit.clone().with("--mask", &mask).is_refused(&["takes no --mask"]);
    edit.clone().with("--strength", "0.5").is_refused(&["takes no --strength"]);
    edit.with("--image-guidance", "0.5").is_refused(&["at least 1"]);
    let base = base.with("--image", &picture);
    base.clone().with("--image-guidance", "2").is_refused(&["only an edit model"]);
    base.clone().with("--strength", "0.1").is_refused(&["a strength of 0.1 leaves none of 4 steps"]);
    base.clone().with("--strength", "-1").is_refused(&["a strength of -1 is not between 0 and 1"]);
    base.clone().with("--strength", "nan").is_refused(&["a strength of NaN"]);
    base.clone().args(["--height", "64", "--width", "72"]).is_refused(&["the picture of --image is 64x64"]);
    base.clone().with("--clip-skip", "9").is_refused(&["cannot leave out 9 more"]);
    let other = root.path().join("other.png");
    Picture { width: 12, height: 8, rgb: vec![7; 12 * 8 * 3] }.write_png(&other, &[]).unwrap();
    base.with("--mask", &other).is_refused(&["the mask is 12x8"]);
    let base = generating(&repo("tests/golden/base-like"));
    base.clone().with("--image", &other).is_refused(&["width 12 is not a multiple of 8"]);
    base.with("--image", repo("Cargo.toml")).is_refused(&["Cargo.toml", "is no PNG"]);
}

#[test]
fn long_prompts_in_pieces() {
    let folder = PipelineFolder::open(&repo("tests/golden/base-like")).unwrap();
    let load = || PromptEncoder::load(&folder, Placement::CPU).unwrap();
    let long = load().with_options(PromptOptions { long_prompts: true, ..PromptOptions::default() });
    let encode = |encoder: &PromptEncoder, prompt: &str, negative: Option<&str>| {
        Guidance::encode(encoder, &folder, prompt, negative, 4.0, (64, 64)).unwrap().conditioning
    };
    // A prompt that fits is encoded as ever.
    let (short, usual) = (encode(&long, PROMPT, None), encode(&load(), PROMPT, None));
    assert_eq!(short.encoder_hidden_states, usual.encoder_hidden_states);
    assert_eq!(short.text_embeds, usual.text_embeds);
    // The states of the first 77 tokens come first, and the pooled text is theirs; so of the
    // negative prompt, which is shorter, and goes on with an empty piece.
    let text = "the cat and the dog sat on a red mat, ".repeat(12);
    let (pieces, cut) = (encode(&long, &text, Some("a dog")), encode(&load(), &text, Some("a dog")));
    let length = pieces.encoder_hidden_states.size()[1];
    assert!(length > 77 && length % 77 == 0, "{length}");
    assert_eq!(pieces.encoder_hidden_states.narrow(1, 0, 77), cut.encoder_hidden_states);
    assert_eq!(pieces.text_embeds, cut.text_embeds);
    let empty = encode(&load(), "a cat", Some("")).encoder_hidden_states.narrow(0, 0, 1);
    assert_eq!(pieces.encoder_hidden_states.narrow(0, 0, 1).narrow(1, 77, 77), empty);
    let second = pieces.encoder_hidden_states.narrow(0, 1, 1).narrow(1, 77, 77);
    assert!((second - empty).abs().max().double_value(&[]) > 0.1);
    let drawn = draw(&folder, &GenerateRequest { prompt: text, ..request(None) });
    assert_eq!(drawn.latents.kind(), Kind::Float);
}

#[test]
fn prompts_of_a_batch_have_the_states_of_single_ones() {
    let long = "the cat and the dog sat on a red mat, ".repeat(12);
    let prompts = ["a cat", &long, "", "the dog and two cats on a mat", "a cat"];
    for model in [repo("tests/golden/base-like"), repo("models/emoji-sdxl")] {
        let folder = PipelineFolder::open(&model).unwrap();
        for (options, negative, scale) in [
            (PromptOptions::default(), None, 4.0),
            (PromptOptions { clip_skip: 1, long_prompts: true }, Some("a dog"), 4.0),
            (PromptOptions { clip_skip: 0, long_prompts: true }, None, 1.0),
        ] {
            let encoder = PromptEncoder::load(&folder, Placement::CPU).unwrap().with_options(options);
            let all = Guidance::encode_all(&encoder, &folder, &prompts, negative, scale, (64, 64)).unwrap();
            assert_eq!(all.len(), prompts.len());
            for (batched, prompt) in all.iter().zip(prompts) {
                let single = Guidance::encode(&encoder, &folder, prompt, negative, scale, (64, 64)).unwrap();
                assert_eq!(batched.scale, single.scale);
                let (ours, theirs) = (&batched.conditioning, &single.conditioning);
                for (ours, theirs) in [
                    (&ours.encoder_hidden_states, &theirs.encoder_hidden_states),
                    (&ours.text_embeds, &theirs.text_embeds),
                    (&ours.time_ids, &theirs.time_ids),
                ] {
                    let error = relative_error(ours, theirs);
                    assert!(error < 1e-5, "`{prompt}`, {options:?}: {error}");
                }
            }
        }
    }
}

#[test]
fn weights_in_brackets_are_said_once_and_long_prompts_are_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let png = folder.path().join("x.png");
    let run = Squeeze::new("generate").model(repo("tests/golden/base-like")).args(["--steps", "1", "--overwrite", "--prompt"]);
    let ended = run.clone().arg("a (red:1.3) cat").args(["--negative-prompt", "((blurry))"]).with("-o", &png).succeeds();
    assert_eq!(ended.text().matches("weights in brackets are not interpreted").count(), 1, "{ended}");
    assert!(ended.text().contains("`(red:1.3) cat`"), "{ended}");
    let long = "the cat and the dog sat on a red mat, ".repeat(12);
    let ended = run.clone().arg(&long).arg("--long-prompts").with("-o", &png).succeeds();
    assert!(!ended.text().contains("cut"), "{ended}");
    assert!(run.arg(&long).with("-o", &png).succeeds().text().contains("the prompt is cut to 77 tokens"));
}
