//! How prompts are read.

/// How prompts are read. The default is diffusers': the states before an encoder's last layer, and
/// at most 77 tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PromptOptions {
    /// Layers left out at the end of each text encoder, in addition to the last (`clip_skip` in
    /// diffusers). As there, the negative prompt and the pooled text pass all layers.
    pub clip_skip: usize,
    /// Whether a prompt of more than 77 tokens is encoded in pieces, whose states are put side by
    /// side, as Stable Diffusion's web interfaces do. Else it is cut, as in diffusers. The pooled
    /// text is that of the first piece.
    pub long_prompts: bool,
}

/// The first part of a prompt that looks like weights in brackets, `(word:1.2)` or `((word))` or
/// `[[word]]`, which other programs interpret.
pub(crate) fn weight_in_brackets(prompt: &str) -> Option<&str> {
    let shown = |start: usize| {
        let end = prompt[start..].char_indices().nth(40).map_or(prompt.len(), |(length, _)| start + length);
        &prompt[start..end]
    };
    if let Some(start) = ["((", "[["].iter().filter_map(|twice| prompt.find(twice)).min() {
        return Some(shown(start));
    }
    let mut rest = prompt.char_indices();
    rest.find_map(|(start, character)| {
        let inside = if character == '(' { prompt[start + 1..].split(')').next()? } else { return None };
        // Without a closing bracket, `inside` is all that is left.
        let is_closed = start + 1 + inside.len() < prompt.len();
        let (_, number) = inside.rsplit_once(':')?;
        (is_closed && number.trim().parse::<f32>().is_ok()).then(|| shown(start))
    })
}

#[cfg(test)]
mod tests {
    use super::weight_in_brackets;

    #[test]
    fn brackets_that_look_like_weights() {
        for prompt in ["a (red:1.3) cat", "((a cat))", "a [[cat]]", "é (a: b, c: .5 )", "(x)(y:2)"] {
            assert!(weight_in_brackets(prompt).is_some(), "{prompt}");
        }
        for prompt in ["a cat (smiling)", "at 12:30", "(a: b)", "a) b:1.0", "(a:1", "[a]", "", "(", "é)(é"] {
            assert_eq!(weight_in_brackets(prompt), None, "{prompt}");
        }
        assert_eq!(weight_in_brackets(&format!("a ((é{}", "x".repeat(100))).unwrap().chars().count(), 40);
    }
}
