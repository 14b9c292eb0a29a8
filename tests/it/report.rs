//! The report: metrics compared with scikit-image, the page tested with a strict parser and with
//! hostile texts, and the files.

use sdxl_squeeze::picture::Picture;
use sdxl_squeeze::report::metrics::{HIGHEST_PSNR, psnr, ssim};
use sdxl_squeeze::report::{self, Comparison, Dense, Judged, LayerRow, Row, Spread, StageError};
use serde_json::Value;

use crate::support::{repo, tensors};

#[test]
fn metrics_equal_scikit_image() {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(repo("tests/golden/metrics.json")).unwrap()).unwrap();
    let stored = tensors(&repo("tests/golden/metrics.safetensors"));
    let picture = |name: String| {
        let (height, width, _) = stored[&name].size3().unwrap();
        Picture { width: width as u32, height: height as u32, rgb: Vec::try_from(stored[&name].flatten(0, -1)).unwrap() }
    };
    let cases = golden["cases"].as_object().unwrap();
    assert!(cases.len() > 10);
    for (name, expected) in cases {
        let (a, b) = (picture(format!("{name}.a")), picture(format!("{name}.b")));
        let expected_psnr = expected["psnr"].as_f64().unwrap_or(HIGHEST_PSNR);
        let off = [
            ("psnr", (psnr(&a, &b).unwrap() - expected_psnr).abs()),
            ("ssim", (ssim(&a, &b).unwrap() - expected["ssim"].as_f64().unwrap()).abs()),
        ];
        for (metric, off) in off {
            assert!(off < 1e-12, "{name}: {metric} is {off:e} off");
        }
    }
}

/// A pseudorandom number from 0 to 1 that depends only on `seed`.
fn noise(seed: usize) -> f64 {
    let mixed = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    ((mixed ^ (mixed >> 32)) % 10_000) as f64 / 10_000.0
}

/// One of the emoji of the model's sample sheet, with noise that grows with `error`.
fn emoji(sheet: &Picture, index: u32, error: f64) -> Picture {
    let (left, top) = (index % 8 * 128, index / 8 * 128);
    let mut rgb = Vec::new();
    for (y, x) in (0..64).flat_map(|y| (0..64).map(move |x| (y, x))) {
        let at = 3 * ((top + 2 * y) * sheet.width + left + 2 * x) as usize;
        for (channel, value) in sheet.rgb[at..at + 3].iter().enumerate() {
            let off = 900.0 * error * (noise(at + channel) - 0.5);
            rgb.push((f64::from(*value) + off).clamp(0.0, 255.0) as u8);
        }
    }
    Picture { width: 64, height: 64, rgb }
}

fn samples() -> Picture {
    let file = std::io::BufReader::new(std::fs::File::open(repo("models/emoji-sdxl/samples.png")).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut rgb).unwrap();
    assert_eq!(info.color_type, png::ColorType::Rgb);
    Picture { width: info.width, height: info.height, rgb }
}

/// A comparison with invented but plausible figures, which has the rows of the tutorial for a small
/// model.
fn plausible() -> Comparison {
    let sheet = samples();
    let rows: [(&str, f64, f64, f64); 11] = [
        ("8-bit", 0.0, 8.0, 0.0012),
        ("6-bit", 0.0, 6.0, 0.0050),
        ("4-bit", 0.0, 4.0, 0.0310),
        ("4-bit gs4", 0.0, 4.3, 0.0093),
        ("4-bit gs16", 0.0, 4.1, 0.0101),
        ("4-bit gs32", 0.0, 4.05, 0.0125),
        ("40% + 4-bit gs4", 0.4, 3.7, 0.0375),
        ("40% + 4-bit gs16", 0.4, 3.48, 0.0370),
        ("50% + 4-bit gs4", 0.5, 3.3, 0.0580),
        ("50% + 4-bit gs16", 0.5, 3.08, 0.0590),
        ("2:4", 0.5, 9.0, 0.0710),
    ];
    let prompts = [
        "an emoji of a fox face",
        "a picture of a tulip",
        "rocket",
        "an emoji of a slice of pizza",
        "owl",
        "a picture of a snowman",
    ];
    let shown = [2, 8, 12, 21, 17, 28];
    let dense: Vec<_> = shown.iter().map(|i| emoji(&sheet, *i, 0.0)).collect();
    let row = |index: usize, (name, sparsity, bits, error): (&str, f64, f64, f64)| {
        let pictures: Vec<_> = shown.iter().map(|i| emoji(&sheet, *i, error)).collect();
        let closeness = report::metrics::closeness(&dense, &pictures).unwrap();
        let bytes = (8_371_780.0 * bits / 8.0) as u64;
        Row {
            name: name.into(),
            config_yaml: format!(
                "model: models/emoji-sdxl\nprune:\n  target_sparsity: {sparsity}\npalettize:\n  n_bits: 4\n  group_size: 16\n"
            ),
            sparsity_asked: (sparsity > 0.0).then_some(sparsity),
            sparsity_stored: sparsity * 1.0003,
            bits_per_weight: bits,
            bytes: bytes + 120_000,
            compressed_weight_bytes: bytes,
            unet_error: error,
            latent_error_by_step: (0..30).map(|step| error * (0.1 + f64::from(step) / 25.0).powf(0.7)).collect(),
            psnr: closeness.psnr,
            ssim: closeness.ssim,
            seconds: 1.5 + 8.0 * sparsity,
            peak_bytes: Some(410_000_000),
            stages: stages().map(|(i, stage)| StageError { name: stage.into(), error: error * (0.3 + 0.2 * i as f64) }).collect(),
            layers: layers(index, sparsity, bits, error),
            pictures,
            warnings: if index == 4 {
                vec!["mid_block.attentions.0.proj_in: 96 vectors for 128 columns".into()]
            } else {
                Vec::new()
            },
            ..Row::default()
        }
    };
    Comparison {
        title: "emoji-sdxl, compressed eleven ways".into(),
        model: "emoji-sdxl".into(),
        version: "0.1.0".into(),
        created_by: "sdxl-squeeze compare".into(),
        device: "cpu, 2 threads".into(),
        calibration: ["cat face", "banana", "an emoji of a violin"].map(Into::into).into(),
        judged: (231..).zip(prompts).map(|(seed, prompt)| Judged { prompt: prompt.into(), seed }).collect(),
        dense: Dense { name: "dense fp16".into(), bytes: 16_760_000, bits_per_weight: 16.0, pictures: dense.clone() },
        rows: rows.into_iter().enumerate().map(|(i, spec)| row(i, spec)).collect(),
        warnings: vec!["calibration has 3 prompts; more of them make a better model".into()],
        how: vec![
            "UNet error: ‖compressed - dense‖ / ‖dense‖ over 48 calls of the UNet on the judged prompts.".into(),
            "Time: seconds to compress, without the calibration run that all configs share.".into(),
        ],
        ..Comparison::default()
    }
}

fn stages() -> impl Iterator<Item = (usize, &'static str)> {
    let names = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"];
    names.into_iter().enumerate()
}

fn layers(row: usize, sparsity: f64, bits: f64, error: f64) -> Vec<LayerRow> {
    let layer = |stage: usize, name: &str, i: usize| {
        let conv = i.is_multiple_of(3);
        let layer_error = error * (0.2 + 2.0 * noise(1000 * row + 50 * stage + i));
        LayerRow {
            name: format!("{name}.{}.{i}", if conv { "resnets" } else { "attentions" }),
            stage: name.into(),
            kind: if conv { "Conv2d 3x3".into() } else { "Linear".into() },
            shape: if conv { vec![128, 64, 3, 3] } else { vec![128, 128] },
            bits_per_weight: bits,
            sparsity,
            bytes: 8_192,
            vectors: (sparsity > 0.0).then_some(32_768),
            weight_error: 2.0 * layer_error,
            pruned_error: (sparsity > 0.0).then_some(0.8 * layer_error),
            output_error: (sparsity > 0.0).then_some(layer_error),
        }
    };
    stages().flat_map(|(stage, name)| (0..[6, 18, 22, 16, 30, 24, 9][stage]).map(move |i| layer(stage, name, i))).collect()
}

/// The page as XML, in which HTML's void elements are closed.
fn xml(page: &str) -> String {
    regex::Regex::new("<((?:meta|img|br)[^>]*)>").unwrap().replace_all(page, "<$1/>").into_owned()
}

/// Parses the page with a strict parser.
fn parse(xml: &str) -> roxmltree::Document<'_> {
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..roxmltree::ParsingOptions::default() };
    roxmltree::Document::parse_with_options(xml, options).unwrap()
}

/// Returns whether no text and no attribute has NaN or infinite numbers. The letters of embedded
/// pictures are skipped, because they can spell anything.
fn finite(document: &roxmltree::Document) -> bool {
    let attributes = document.descendants().flat_map(|node| node.attributes()).filter(|attribute| attribute.name() != "src");
    let texts = document.descendants().filter_map(|node| node.text());
    attributes.map(|attribute| attribute.value()).chain(texts).all(|text| !text.contains("NaN") && !text.contains("inf"))
}

#[test]
fn the_page_is_well_formed_and_needs_nothing_else() {
    let comparison = plausible();
    let page = report::html::page(&comparison).unwrap();
    let xml = xml(&page);
    let document = parse(&xml);
    let named = |name: &'static str| document.descendants().filter(move |node| node.has_tag_name(name));
    assert_eq!(named("script").count() + named("link").count() + named("iframe").count(), 0);
    // Each model has one picture in the table and one for each prompt.
    assert_eq!(named("img").count(), 12 * (1 + comparison.judged.len()));
    assert!(named("img").all(|node| node.attribute("src").unwrap().starts_with("data:image/png;base64,iVBOR")));
    for attribute in document.descendants().flat_map(|node| node.attributes()) {
        assert!(!attribute.name().starts_with("on"), "{}", attribute.name());
        assert!(attribute.name() != "href" || attribute.value().starts_with('#'));
    }
    assert!(!page.contains("url(") && !page.contains("@import"));
    // Every link has a target in the page.
    let ids: Vec<_> = document.descendants().filter_map(|node| node.attribute("id")).collect();
    let links: Vec<_> = named("a").filter_map(|node| node.attribute("href")).collect();
    assert!(!links.is_empty() && links.iter().all(|link| ids.contains(&&link[1..])));
    // Every layer has a dot with a title.
    let layers = comparison.rows.iter().map(|row| row.layers.len()).sum::<usize>();
    let dots = named("circle").filter(|node| node.attribute("class").is_some_and(|class| class.starts_with("dot k")));
    assert_eq!(dots.filter(|node| node.children().any(|child| child.has_tag_name("title"))).count(), layers);
    assert!(finite(&document));
    for word in ["How it was measured", "40% + 4-bit gs16", "16,760,000 bytes", "Judged on", "1 warning"] {
        assert!(page.contains(word), "{word}");
    }
    assert_eq!(page, report::html::page(&comparison).unwrap());
}

#[test]
fn hostile_text_stays_text() {
    let evil = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\u{0}\u{7}\u{202e}]]>--></style>";
    let mut comparison = plausible();
    let texts = [
        &mut comparison.title,
        &mut comparison.model,
        &mut comparison.version,
        &mut comparison.created_by,
        &mut comparison.device,
    ];
    texts.into_iter().for_each(|text| *text = evil.into());
    comparison.dense.name = evil.into();
    comparison.judged[0].prompt = evil.into();
    comparison.calibration[0] = evil.into();
    comparison.warnings[0] = evil.into();
    comparison.how[0] = evil.into();
    let row = &mut comparison.rows[7];
    row.name = evil.into();
    row.config_yaml = evil.into();
    row.warnings = vec![evil.into()];
    row.stages[0].name = evil.into();
    let layer = &mut row.layers[0];
    for text in [&mut layer.name, &mut layer.stage, &mut layer.kind] {
        *text = evil.into();
    }
    let page = report::html::page(&comparison).unwrap();
    let xml = xml(&page);
    let document = parse(&xml);
    assert_eq!(document.descendants().filter(|node| node.has_tag_name("script")).count(), 0);
    assert_eq!(document.descendants().filter(|node| node.has_tag_name("img")).count(), 12 * 7);
    assert!(!page.contains("<script") && !page.contains("<img src=x"));
    // The text is shown in many places, so it was escaped and not dropped.
    let shown = document.descendants().filter(|node| node.text().is_some_and(|text| text.contains("<script>alert(1)</script>")));
    assert!(shown.count() > 20);
    assert_eq!(Comparison::from_json(&comparison.to_json()).unwrap().rows[7].name, evil);
}

#[test]
fn odd_data_still_gives_a_page() {
    let mut comparison = plausible();
    let row = &mut comparison.rows[0];
    (row.unet_error, row.seconds) = (f64::NAN, f64::INFINITY);
    row.latent_error_by_step = vec![f64::NAN, 0.0, f64::INFINITY];
    row.psnr = Spread::of(Vec::new());
    row.ssim = Spread::of(vec![f64::NAN]);
    row.stages[0].error = f64::NAN;
    row.layers[0].output_error = Some(f64::INFINITY);
    row.pictures.clear();
    comparison.rows[1] = Row::default();
    comparison.dense.bytes = 0;
    for comparison in [comparison, Comparison::default(), Comparison { rows: vec![Row::default()], ..Comparison::default() }] {
        let page = report::html::page(&comparison).unwrap();
        assert!(finite(&parse(&xml(&page))));
        report::sheet::contact_sheet(&comparison).unwrap();
        let _ = report::table::plain(&comparison);
        report::table::markdown(&comparison);
    }
    let mut broken = plausible();
    broken.rows[2].pictures[0].rgb.pop();
    assert!(report::write(&broken, tempfile::tempdir().unwrap().path()).unwrap_err().is_bad_input());
}

#[test]
fn json_gives_the_comparison_back() {
    let mut comparison = plausible();
    let back = Comparison::from_json(&comparison.to_json()).unwrap();
    comparison.dense.pictures.clear();
    comparison.rows.iter_mut().for_each(|row| row.pictures.clear());
    assert_eq!(back, comparison);
    assert_eq!(back.to_json(), comparison.to_json());
}

/// With REPORT_SAMPLE=DIR the files are left in DIR for inspection.
#[test]
fn all_files_are_written_and_written_again_the_same() {
    let comparison = plausible();
    let temporary = tempfile::tempdir().unwrap();
    let folder = std::env::var_os("REPORT_SAMPLE").map_or_else(|| temporary.path().join("new/report"), Into::into);
    let written = report::write(&comparison, &folder).unwrap();
    let read = || [&written.html, &written.json, &written.sheet].map(|path| std::fs::read(path).unwrap());
    let first = read();
    report::write(&comparison, &folder).unwrap();
    assert!(first == read());
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 3);
    assert!(report::table::plain(&comparison).lines().count() == 13);
}
