//! How times are distributed, in few numbers.
//!
//! A power of two is divided into 32 buckets of one width, as HDR histograms do, and only the buckets that hold something are
//! kept. A request touches a few of them when it ends, and a histogram of latencies is some tens of pairs.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::nanos;

/// Buckets a power of two, as a power of two.
const SUB_BITS: u32 = 5;

/// A set of durations. Quantiles are off by [`Distribution::RELATIVE_ERROR`] at most, everything else is exact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Histogram {
    /// Bucket and how many values it holds, in the order of the buckets.
    buckets: Vec<(u16, u64)>,
    count: u64,
    sum: u128,
    min: u64,
    max: u64,
}

impl Histogram {
    pub(crate) fn record(&mut self, duration: Duration) {
        let value = nanos(duration);
        self.add(bucket(value), 1);
        self.min = if self.count == 0 {
            value
        } else {
            self.min.min(value)
        };
        self.max = self.max.max(value);
        self.count += 1;
        self.sum += u128::from(value);
    }

    fn add(&mut self, bucket: u16, count: u64) {
        match self.buckets.binary_search_by_key(&bucket, |&(bucket, _)| bucket) {
            Ok(at) => self.buckets[at].1 += count,
            Err(at) => self.buckets.insert(at, (bucket, count)),
        }
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        for &(bucket, count) in &other.buckets {
            self.add(bucket, count);
        }
        self.min = if self.count == 0 {
            other.min
        } else {
            self.min.min(other.min)
        };
        self.max = self.max.max(other.max);
        self.count += other.count;
        self.sum += other.sum;
    }

    /// Empties it and keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.buckets.clear();
        self.count = 0;
        self.sum = 0;
        self.min = 0;
        self.max = 0;
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The value that at least `permille` thousandths of all values do not exceed (the nearest rank).
    pub(crate) fn quantile(&self, permille: u16) -> Option<Duration> {
        let rank = (u128::from(self.count) * u128::from(permille))
            .div_ceil(1000)
            .max(1);
        let mut seen = 0;
        for &(bucket, count) in &self.buckets {
            seen += u128::from(count);
            if seen >= rank {
                // The extremes are known exactly.
                return Some(Duration::from_nanos(middle(bucket).clamp(self.min, self.max)));
            }
        }
        None
    }

    pub(crate) fn distribution(&self) -> Distribution {
        let known = |nanos: u64| (self.count > 0).then(|| seconds(u128::from(nanos)));
        let quantile = |permille| self.quantile(permille).map(|duration| duration.as_secs_f64());
        Distribution {
            count: self.count,
            sum_s: seconds(self.sum),
            mean_s: (self.count > 0).then(|| seconds(self.sum) / self.count as f64),
            min_s: known(self.min),
            max_s: known(self.max),
            p50_s: quantile(500),
            p90_s: quantile(900),
            p99_s: quantile(990),
        }
    }
}

fn seconds(nanos: u128) -> f64 {
    nanos as f64 / 1e9
}

/// The bucket of a value: values below 64 have their own, those from 64 to 127 share one by two, and so on.
fn bucket(value: u64) -> u16 {
    let bits = u64::BITS - value.leading_zeros();
    let shift = bits.saturating_sub(SUB_BITS + 1);
    ((shift << SUB_BITS) + (value >> shift) as u32) as u16
}

/// The value in the middle of a bucket.
fn middle(bucket: u16) -> u64 {
    let shift = (u32::from(bucket) >> SUB_BITS).saturating_sub(1);
    let low = u64::from(u32::from(bucket) - (shift << SUB_BITS)) << shift;
    low + ((1 << shift) >> 1)
}

/// A set of times, in seconds. What needs at least one value is `None` where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// How many there are.
    pub count: u64,
    /// All of them together.
    pub sum_s: f64,
    /// Their mean.
    pub mean_s: Option<f64>,
    /// The shortest.
    pub min_s: Option<f64>,
    /// The longest.
    pub max_s: Option<f64>,
    /// What half of them do not exceed.
    pub p50_s: Option<f64>,
    /// What nine tenths of them do not exceed.
    pub p90_s: Option<f64>,
    /// What 99 of 100 do not exceed.
    pub p99_s: Option<f64>,
}

impl Distribution {
    /// How far a quantile may be from the exact one (by nearest rank), relative to it: 1/64, below 1.6%. Below 64 ns
    /// quantiles are exact.
    pub const RELATIVE_ERROR: f64 = 1.0 / 64.0;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn histogram(values: &[u64]) -> Histogram {
        let mut histogram = Histogram::default();
        for &value in values {
            histogram.record(Duration::from_nanos(value));
        }
        histogram
    }

    /// Values of every order of magnitude.
    fn values() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(
            (any::<u64>(), 0..64_u32).prop_map(|(value, by)| value >> by),
            1..400,
        )
    }

    #[test]
    fn buckets_follow_one_another() {
        assert_eq!((bucket(0), bucket(63), bucket(64), bucket(66)), (0, 63, 64, 65));
        let last = bucket(u64::MAX);
        for bucket_ in 0..=last {
            assert_eq!(bucket(middle(bucket_)), bucket_);
        }
        assert_eq!(last, 1919);
    }

    #[test]
    fn nothing_has_no_quantile() {
        let empty = Histogram::default();
        assert_eq!(empty.quantile(500), None);
        assert_eq!(empty.distribution(), Distribution::default());
    }

    #[test]
    fn one_value_is_every_quantile_exactly() {
        let one = histogram(&[1_234_567_891]).distribution();
        let exactly = Some(1.234_567_891);
        assert_eq!(
            (one.min_s, one.max_s, one.p50_s, one.p99_s),
            (exactly, exactly, exactly, exactly)
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn quantiles_keep_their_bound(values in values(), permille in 0..=1000_u16) {
            let mut sorted = values.clone();
            sorted.sort_unstable();
            let rank = (values.len() * usize::from(permille)).div_ceil(1000).max(1);
            let exact = sorted[rank - 1];
            let found = nanos(histogram(&values).quantile(permille).unwrap());
            let allowed = exact as f64 * Distribution::RELATIVE_ERROR;
            prop_assert!((exact.abs_diff(found)) as f64 <= allowed, "{found} for {exact}");
        }

        #[test]
        fn everything_else_is_exact(values in values()) {
            let found = histogram(&values);
            prop_assert_eq!(found.count, values.len() as u64);
            prop_assert_eq!(found.sum, values.iter().map(|&value| u128::from(value)).sum::<u128>());
            prop_assert_eq!(Some(found.min), values.iter().min().copied());
            prop_assert_eq!(Some(found.max), values.iter().max().copied());
        }

        #[test]
        fn merging_is_recording_both(one in values(), other in values()) {
            let mut merged = histogram(&one);
            merged.merge(&histogram(&other));
            let both: Vec<u64> = one.iter().chain(&other).copied().collect();
            prop_assert_eq!(&merged, &histogram(&both));
            merged.clear();
            merged.merge(&Histogram::default());
            prop_assert_eq!(merged, Histogram::default());
        }
    }
}
