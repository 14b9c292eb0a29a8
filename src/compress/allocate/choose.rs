//! The choice of one setting for each layer.

/// A setting of a layer: its size and its error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Stored bytes.
    pub bytes: u64,
    /// The share of the UNet's error that is due to the layer.
    pub cost: f64,
}

/// One choice for each layer, by index, with at most `budget` bytes in total and a small total
/// cost; `None` if even the smallest choices take too many bytes. Every layer has at least one
/// choice.
///
/// By Lagrange's multiplier (Shoham and Gersho 1988): for a given price of a byte each layer takes
/// the choice of least cost plus price, and the price is the lowest at which the budget holds.
/// Bytes that are left over go to the single changes that gain most per byte.
pub fn choose(layers: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let at = |price: f64| -> Vec<usize> {
        let least = |choices: &Vec<Choice>| {
            let total = |choice: &Choice| choice.cost + price * choice.bytes as f64;
            let order = |a: &Choice, b: &Choice| total(a).total_cmp(&total(b)).then(a.bytes.cmp(&b.bytes));
            choices.iter().enumerate().min_by(|a, b| order(a.1, b.1)).map_or(0, |(index, _)| index)
        };
        layers.iter().map(least).collect()
    };
    let bytes = |chosen: &[usize]| -> u64 { chosen.iter().zip(layers).map(|(index, choices)| choices[*index].bytes).sum() };
    let smallest = |choices: &Vec<Choice>| {
        let order = |a: &Choice, b: &Choice| a.bytes.cmp(&b.bytes).then(a.cost.total_cmp(&b.cost));
        choices.iter().enumerate().min_by(|a, b| order(a.1, b.1)).map_or(0, |(index, _)| index)
    };
    let mut chosen: Vec<usize> = layers.iter().map(smallest).collect();
    if bytes(&chosen) > budget {
        return None;
    }
    let most = layers.iter().flatten().map(|choice| choice.cost).fold(0.0, f64::max);
    let (mut low, mut high) = (0.0, most.max(f64::MIN_POSITIVE));
    for _ in 0..200 {
        let middle = if low == 0.0 { high / 1e3 } else { f64::sqrt(low * high) };
        let tried = at(middle);
        if bytes(&tried) <= budget {
            (chosen, high) = (tried, middle);
        } else {
            low = middle;
        }
        if high < most * 1e-30 || (low > 0.0 && high / low < 1.0 + 1e-12) {
            break;
        }
    }
    let mut left = budget - bytes(&chosen);
    loop {
        let gain = |layer: usize, to: usize| {
            let (now, new) = (layers[layer][chosen[layer]], layers[layer][to]);
            let more = new.bytes.saturating_sub(now.bytes);
            let fits = new.cost < now.cost && more <= left;
            fits.then(|| (now.cost - new.cost) / more.max(1) as f64)
        };
        let all = (0..layers.len()).flat_map(|layer| (0..layers[layer].len()).map(move |to| (layer, to)));
        let best = all.filter_map(|(layer, to)| Some((gain(layer, to)?, layer, to)));
        let Some((_, layer, to)) = best.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2))) else {
            return Some(chosen);
        };
        left = left + layers[layer][chosen[layer]].bytes - layers[layer][to].bytes;
        chosen[layer] = to;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn layers() -> impl Strategy<Value = Vec<Vec<Choice>>> {
        let choice = (1..200_u64, 0.0..1.0_f64).prop_map(|(bytes, cost)| Choice { bytes, cost });
        prop::collection::vec(prop::collection::vec(choice, 1..5), 1..6)
    }

    fn totals(layers: &[Vec<Choice>], chosen: &[usize]) -> (u64, f64) {
        let picked = chosen.iter().zip(layers).map(|(index, choices)| choices[*index]);
        picked.fold((0, 0.0), |(bytes, cost), choice| (bytes + choice.bytes, cost + choice.cost))
    }

    proptest! {
        #[test]
        fn within_the_budget_and_near_the_best_of_all(layers in layers(), budget in 1..800_u64) {
            let mut best = None;
            let count: usize = layers.iter().map(Vec::len).product();
            for mut way in 0..count {
                let chosen: Vec<usize> = layers.iter().map(|choices| {
                    let index = way % choices.len();
                    way /= choices.len();
                    index
                }).collect();
                let (bytes, cost) = totals(&layers, &chosen);
                if bytes <= budget && best.is_none_or(|best| cost < best) {
                    best = Some(cost);
                }
            }
            match (choose(&layers, budget), best) {
                (None, None) => {}
                (Some(chosen), Some(best)) => {
                    let (bytes, cost) = totals(&layers, &chosen);
                    prop_assert!(bytes <= budget);
                    // No further off than one layer's worst choice is from its best.
                    prop_assert!(cost <= best + 1.0 && cost >= best - 1e-9);
                    // And no single change would be better.
                    for (layer, choices) in layers.iter().enumerate() {
                        for (to, choice) in choices.iter().enumerate() {
                            let mut other = chosen.clone();
                            other[layer] = to;
                            prop_assert!(choice.cost >= choices[chosen[layer]].cost || totals(&layers, &other).0 > budget);
                        }
                    }
                }
                (found, best) => prop_assert!(false, "{found:?} but {best:?}"),
            }
        }
    }

    #[test]
    fn never_worse_than_the_same_for_all() {
        let layers: Vec<Vec<Choice>> = (1..60)
            .map(|n| {
                let weight = f64::from(n * n % 17 + 1);
                (0..4).map(|step| Choice { bytes: 100 * (step + 2), cost: weight * 4_f64.powi(-(step as i32)) }).collect()
            })
            .collect();
        for step in 0..4 {
            let same = vec![step; layers.len()];
            let (bytes, cost) = totals(&layers, &same);
            assert!(totals(&layers, &choose(&layers, bytes).unwrap()).1 <= cost);
        }
    }
}
