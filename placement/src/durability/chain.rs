//! Continuous-time Markov chains with a few states and rates that differ by twenty powers of ten.
//!
//! A chain here never ends: what would end it, the loss, leads back to state 0, and the rate of losses is how often
//! that happens in the long run, one divided by the mean time from state 0 to a loss. The long run is found by the
//! elimination of Grassmann, Taksar and Heyman ("Regenerative analysis and steady state distributions for Markov
//! chains", 1985), which only adds, multiplies and divides positive numbers: nothing cancels, so even a rate of 1e-30
//! comes out right to many digits.

/// A chain. State 0 is where everything is well.
pub(super) struct Chain {
    /// Rate from each state to each other, per hour. Losses are in the column of state 0 as well.
    rates: Vec<Vec<f64>>,
    /// (state, class, rate): losses by what they are to be counted as.
    losses: Vec<(usize, usize, f64)>,
}

/// What a chain does in the long run.
pub(super) struct LongRun {
    /// Part of the time in each state.
    pub share: Vec<f64>,
    /// Losses per hour of each class.
    pub losses: Vec<f64>,
}

impl Chain {
    pub fn new(states: usize) -> Chain {
        Chain { rates: vec![vec![0.0; states]; states], losses: Vec::new() }
    }

    /// A way from one state to another. One that is not there leads nowhere.
    pub fn add(&mut self, from: usize, to: usize, per_hour: f64) {
        if let Some(rate) = self.rates.get_mut(from).and_then(|row| row.get_mut(to)) {
            *rate += per_hour;
        }
    }

    /// A way from a state to the loss, and with it back to state 0.
    pub fn lose(&mut self, from: usize, class: usize, per_hour: f64) {
        self.add(from, 0, per_hour);
        self.losses.push((from, class, per_hour));
    }

    /// The long run. Each state but 0 must have a way to one of a lower number, as repair has.
    pub fn long_run(mut self, classes: usize) -> LongRun {
        let states = self.rates.len();
        for last in (1..states).rev() {
            let (lower, upper) = self.rates.split_at_mut(last);
            let Some(of_last) = upper.first() else { continue };
            let down: f64 = of_last.iter().take(last).sum();
            for row in lower {
                // Time in `last` per visit, times the visits from this row.
                let visits = row[last] / down;
                row[last] = visits;
                for (rate, onward) in row.iter_mut().zip(of_last).take(last) {
                    *rate += visits * onward;
                }
            }
        }
        let mut share = vec![1.0; states];
        for state in 1..states {
            share[state] = (0..state).map(|from| share[from] * self.rates[from][state]).sum();
        }
        let all: f64 = share.iter().sum();
        share.iter_mut().for_each(|part| *part /= all);
        let mut losses = vec![0.0; classes];
        for (from, class, rate) in self.losses {
            losses[class] += share[from] * rate;
        }
        LongRun { share, losses }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mean time to the end of a birth-death chain by its closed form, written as a sum of positive terms.
    fn mean_time(up: &[f64], down: &[f64]) -> f64 {
        let step = |level: usize| -> f64 {
            (0..=level).map(|low| ((low + 1)..=level).map(|i| down[i] / up[i]).product::<f64>() / up[low]).sum()
        };
        (0..up.len()).map(step).sum()
    }

    #[test]
    fn losses_per_hour_are_one_over_the_mean_time_to_a_loss_down_to_1e_40() {
        for scale in [1e-1, 1e-4, 1e-8, 1e-12] {
            let up: Vec<f64> = (0..4).map(|level| scale * f64::from(11 - level)).collect();
            let down: Vec<f64> = (0..4).map(|level| f64::from(level) * 0.7).collect();
            let mut chain = Chain::new(4);
            for level in 0..4 {
                if level == 3 {
                    chain.lose(level, 0, up[level]);
                } else {
                    chain.add(level, level + 1, up[level]);
                }
                if level > 0 {
                    chain.add(level, level - 1, down[level]);
                }
            }
            let (found, right) = (chain.long_run(1).losses[0], 1.0 / mean_time(&up, &down));
            assert!((found / right - 1.0).abs() < 1e-12, "{found} is not {right}");
        }
    }
}
