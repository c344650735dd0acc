//! What a request asks of sampling and stopping.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{ParamError, Priority, ToolChoice};

/// How to sample and when to stop.
///
/// The defaults sample at temperature 0.7 from the whole distribution, with every penalty off, and stop after 512
/// tokens. Ranges follow the OpenAI API where it has the parameter and mlx-lm where it has not.
///
/// ```
/// use mlx_engine_core::GenerateParams;
///
/// let params = GenerateParams::default().with_max_tokens(128).with_top_p(0.9).with_stop(["\n\n"]).with_seed(7);
/// params.validate()?;
///
/// let error = params.with_temperature(3.5).validate().unwrap_err();
/// assert_eq!(error.to_string(), "`temperature` is 3.5, allowed: 0 to 2");
/// # Ok::<(), mlx_engine_core::ParamError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateParams {
    /// The most tokens to generate; at least 1.
    pub max_tokens: u32,
    /// Divides the logits before sampling, 0 to 2. 0 takes the likeliest token.
    pub temperature: f32,
    /// Keeps the likeliest tokens whose probabilities sum to this, above 0 and at most 1. 1 keeps all.
    pub top_p: f32,
    /// Keeps this many of the likeliest tokens. 0 keeps all.
    pub top_k: u32,
    /// Keeps tokens at least this likely relative to the likeliest, 0 to 1. 0 keeps all.
    pub min_p: f32,
    /// Divides (or, below zero, multiplies) the logits of tokens seen in the window, 0.01 to 100. 1 changes nothing.
    pub repetition_penalty: f32,
    /// How many of the latest tokens, prompt included, the repetition penalty looks at; at least 1.
    pub repetition_window: u32,
    /// Taken from the logit of each token generated so far, -2 to 2.
    pub presence_penalty: f32,
    /// Taken from the logit of each token once for every time it was generated, -2 to 2.
    pub frequency_penalty: f32,
    /// Added to the logits of these token ids, -100 to 100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Makes sampling repeatable; `None` draws a seed.
    pub seed: Option<u64>,
    /// Strings that end the generation and are not part of the text. None may be empty.
    pub stop: Vec<String>,
    /// Token ids that end the generation, beside the model's own.
    pub stop_tokens: Vec<u32>,
    /// Whether to report the log probability of each generated token.
    pub logprobs: bool,
    /// How many of the likeliest alternatives to report for each token, 0 to 20; above 0 `logprobs` has to be on.
    pub top_logprobs: u8,
    /// Generates past the model's end-of-sequence tokens, to `max_tokens`. For benchmarks.
    pub ignore_eos: bool,
    /// What the answer has to keep to, token by token; `None` leaves it free.
    pub constraint: Option<OutputConstraint>,
    /// How urgent the request is beside others that wait.
    pub priority: Priority,
    /// Seconds that the request may wait for its turn, above 0 and at most a year; `None` waits as long as it takes. One
    /// that has waited longer is [`DeadlineExceeded`](crate::EngineError::DeadlineExceeded).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_timeout_s: Option<f64>,
    /// The same for the request as a whole, from its submission to the end of its answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<f64>,
    /// Whether the model calls one of the tools that the prompt offers.
    pub tool_choice: ToolChoice,
    /// Whether it may call several in one answer; where not, the answer ends with the first call.
    pub parallel_tool_calls: bool,
    /// The name of the format in which the model writes calls and reasoning, such as `hermes`; `None` takes the one of its
    /// chat template.
    pub tool_format: Option<String>,
    /// Whether what the model thinks before it answers comes as events of its own; where not, it is a part of the text,
    /// with its marks.
    pub separate_reasoning: bool,
    /// Tokens after which the model has to stop thinking; at least 1. The mark that ends its thoughts is fed to it then.
    pub thinking_budget: Option<u32>,
}

/// What an answer has to keep to. It is compiled when the request is admitted, and refused there with the reason where
/// that fails. An answer that is cut at `max_tokens` is the beginning of one that keeps to it.
///
/// ```
/// use mlx_engine_core::{GenerateParams, OutputConstraint};
///
/// let params = GenerateParams::default().with_constraint(OutputConstraint::Regex("(yes|no)".into()));
/// assert_eq!(serde_json::to_value(&params.constraint)?, serde_json::json!({"regex": "(yes|no)"}));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OutputConstraint {
    /// JSON that is valid under this schema, of draft 2020-12 unless its `$schema` says another.
    JsonSchema(serde_json::Value),
    /// A text that matches this regular expression as a whole, without anchors, look-around and word boundaries.
    Regex(String),
    /// A text of this grammar in llguidance's form of Lark, which begins with the rule `start`.
    Lark(String),
}

impl Default for GenerateParams {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            temperature: 0.7,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 20,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: BTreeMap::new(),
            seed: None,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            logprobs: false,
            top_logprobs: 0,
            ignore_eos: false,
            constraint: None,
            priority: Priority::Normal,
            queue_timeout_s: None,
            timeout_s: None,
            tool_choice: ToolChoice::Auto,
            parallel_tool_calls: true,
            tool_format: None,
            separate_reasoning: true,
            thinking_budget: None,
        }
    }
}

impl GenerateParams {
    /// The longest timeout in seconds: a year.
    pub const MAX_TIMEOUT_S: f64 = 31_536_000.0;

    /// The most alternatives that [`top_logprobs`](Self::top_logprobs) may ask for.
    pub const MAX_TOP_LOGPROBS: u8 = 20;

    /// Temperatures below this take the likeliest token: divided by less, logits leave the range of float32.
    pub const GREEDY_BELOW: f32 = 1e-4;

    /// Sets [`max_tokens`](Self::max_tokens).
    pub fn with_max_tokens(mut self, max_tokens: u32) -> Self {
        self.max_tokens = max_tokens;
        self
    }

    /// Sets [`temperature`](Self::temperature).
    pub fn with_temperature(mut self, temperature: f32) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets [`top_p`](Self::top_p).
    pub fn with_top_p(mut self, top_p: f32) -> Self {
        self.top_p = top_p;
        self
    }

    /// Sets [`top_k`](Self::top_k).
    pub fn with_top_k(mut self, top_k: u32) -> Self {
        self.top_k = top_k;
        self
    }

    /// Sets [`min_p`](Self::min_p).
    pub fn with_min_p(mut self, min_p: f32) -> Self {
        self.min_p = min_p;
        self
    }

    /// Sets [`repetition_penalty`](Self::repetition_penalty).
    pub fn with_repetition_penalty(mut self, penalty: f32) -> Self {
        self.repetition_penalty = penalty;
        self
    }

    /// Sets [`repetition_window`](Self::repetition_window).
    pub fn with_repetition_window(mut self, tokens: u32) -> Self {
        self.repetition_window = tokens;
        self
    }

    /// Sets [`presence_penalty`](Self::presence_penalty).
    pub fn with_presence_penalty(mut self, penalty: f32) -> Self {
        self.presence_penalty = penalty;
        self
    }

    /// Sets [`frequency_penalty`](Self::frequency_penalty).
    pub fn with_frequency_penalty(mut self, penalty: f32) -> Self {
        self.frequency_penalty = penalty;
        self
    }

    /// Sets [`constraint`](Self::constraint).
    pub fn with_constraint(mut self, constraint: OutputConstraint) -> Self {
        self.constraint = Some(constraint);
        self
    }

    /// Sets [`tool_choice`](Self::tool_choice).
    pub fn with_tool_choice(mut self, choice: ToolChoice) -> Self {
        self.tool_choice = choice;
        self
    }

    /// Sets [`parallel_tool_calls`](Self::parallel_tool_calls).
    pub fn with_parallel_tool_calls(mut self, parallel: bool) -> Self {
        self.parallel_tool_calls = parallel;
        self
    }

    /// Sets [`tool_format`](Self::tool_format).
    pub fn with_tool_format(mut self, format: impl Into<String>) -> Self {
        self.tool_format = Some(format.into());
        self
    }

    /// Sets [`separate_reasoning`](Self::separate_reasoning).
    pub fn with_separate_reasoning(mut self, separate: bool) -> Self {
        self.separate_reasoning = separate;
        self
    }

    /// Sets [`thinking_budget`](Self::thinking_budget).
    pub fn with_thinking_budget(mut self, tokens: u32) -> Self {
        self.thinking_budget = Some(tokens);
        self
    }

    /// Sets [`logit_bias`](Self::logit_bias).
    pub fn with_logit_bias(mut self, bias: impl IntoIterator<Item = (u32, f32)>) -> Self {
        self.logit_bias = bias.into_iter().collect();
        self
    }

    /// Sets [`seed`](Self::seed).
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Sets [`stop`](Self::stop).
    pub fn with_stop<S: Into<String>>(mut self, stop: impl IntoIterator<Item = S>) -> Self {
        self.stop = stop.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`stop_tokens`](Self::stop_tokens).
    pub fn with_stop_tokens(mut self, stop_tokens: impl IntoIterator<Item = u32>) -> Self {
        self.stop_tokens = stop_tokens.into_iter().collect();
        self
    }

    /// Sets [`logprobs`](Self::logprobs).
    pub fn with_logprobs(mut self, logprobs: bool) -> Self {
        self.logprobs = logprobs;
        self
    }

    /// Sets [`top_logprobs`](Self::top_logprobs), and turns [`logprobs`](Self::logprobs) on where it is above 0.
    pub fn with_top_logprobs(mut self, top_logprobs: u8) -> Self {
        self.top_logprobs = top_logprobs;
        self.logprobs |= top_logprobs > 0;
        self
    }

    /// Sets [`ignore_eos`](Self::ignore_eos).
    pub fn with_ignore_eos(mut self, ignore_eos: bool) -> Self {
        self.ignore_eos = ignore_eos;
        self
    }

    /// Sets [`priority`](Self::priority).
    pub fn with_priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    /// Sets [`queue_timeout_s`](Self::queue_timeout_s).
    pub fn with_queue_timeout_s(mut self, seconds: f64) -> Self {
        self.queue_timeout_s = Some(seconds);
        self
    }

    /// Sets [`timeout_s`](Self::timeout_s).
    pub fn with_timeout_s(mut self, seconds: f64) -> Self {
        self.timeout_s = Some(seconds);
        self
    }

    /// Whether each step takes the likeliest token, which makes the seed irrelevant.
    pub fn is_greedy(&self) -> bool {
        self.temperature < Self::GREEDY_BELOW
    }

    /// Checks every field against its range. NaN and the infinities are in no range.
    ///
    /// # Errors
    ///
    /// The first field that is out of range, with its value and what is allowed.
    pub fn validate(&self) -> Result<(), ParamError> {
        ParamError::at_least("max_tokens", self.max_tokens, 1)?;
        if let Some(tokens) = self.thinking_budget {
            ParamError::at_least("thinking_budget", tokens, 1)?;
            let allowed = "none while `separate_reasoning` is false";
            ParamError::check("thinking_budget", tokens, self.separate_reasoning, allowed)?;
        }
        ParamError::between("temperature", self.temperature, 0.0..=2.0)?;
        let some = self.top_p > 0.0 && self.top_p <= 1.0;
        ParamError::check("top_p", self.top_p, some, "above 0 and at most 1")?;
        ParamError::between("min_p", self.min_p, 0.0..=1.0)?;
        ParamError::between("repetition_penalty", self.repetition_penalty, 0.01..=100.0)?;
        ParamError::at_least("repetition_window", self.repetition_window, 1)?;
        ParamError::between("presence_penalty", self.presence_penalty, -2.0..=2.0)?;
        ParamError::between("frequency_penalty", self.frequency_penalty, -2.0..=2.0)?;
        for (token, &bias) in &self.logit_bias {
            ParamError::between(format_args!("logit_bias[{token}]"), bias, -100.0..=100.0)?;
        }
        if let Some(index) = self.stop.iter().position(String::is_empty) {
            return Err(ParamError::new(
                format_args!("stop[{index}]"),
                "\"\"",
                "a string that is not empty",
            ));
        }
        let likely = self.top_logprobs;
        ParamError::between("top_logprobs", likely, 0..=Self::MAX_TOP_LOGPROBS)?;
        let told = likely == 0 || self.logprobs;
        ParamError::check("top_logprobs", likely, told, "0 while `logprobs` is false")?;
        timeout("queue_timeout_s", self.queue_timeout_s)?;
        timeout("timeout_s", self.timeout_s)
    }
}

fn timeout(field: &str, seconds: Option<f64>) -> Result<(), ParamError> {
    let Some(seconds) = seconds else { return Ok(()) };
    let within = seconds > 0.0 && seconds <= GenerateParams::MAX_TIMEOUT_S;
    ParamError::check(field, seconds, within, "above 0 and at most 31536000")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(params: &GenerateParams, expect: &str) {
        let message = params
            .validate()
            .map_or_else(|error| error.to_string(), |()| "valid".to_owned());
        assert_eq!(message, expect, "{params:?}");
    }

    fn params() -> GenerateParams {
        GenerateParams::default()
    }

    #[test]
    fn the_defaults_are_valid() {
        check(&params(), "valid");
    }

    #[test]
    fn a_refusal_names_the_field_the_value_and_the_range() {
        check(
            &params().with_max_tokens(0),
            "`max_tokens` is 0, allowed: 1 or more",
        );
        check(
            &params().with_temperature(-0.1),
            "`temperature` is -0.1, allowed: 0 to 2",
        );
        check(
            &params().with_temperature(f32::NAN),
            "`temperature` is NaN, allowed: 0 to 2",
        );
        check(
            &params().with_temperature(f32::INFINITY),
            "`temperature` is inf, allowed: 0 to 2",
        );
        check(
            &params().with_top_p(0.0),
            "`top_p` is 0, allowed: above 0 and at most 1",
        );
        check(
            &params().with_top_p(f32::NAN),
            "`top_p` is NaN, allowed: above 0 and at most 1",
        );
        check(&params().with_min_p(1.5), "`min_p` is 1.5, allowed: 0 to 1");
        check(
            &params().with_repetition_penalty(0.0),
            "`repetition_penalty` is 0, allowed: 0.01 to 100",
        );
        check(
            &params().with_repetition_penalty(f32::INFINITY),
            "`repetition_penalty` is inf, allowed: 0.01 to 100",
        );
        check(
            &params().with_repetition_window(0),
            "`repetition_window` is 0, allowed: 1 or more",
        );
        check(
            &params().with_presence_penalty(2.5),
            "`presence_penalty` is 2.5, allowed: -2 to 2",
        );
        check(
            &params().with_frequency_penalty(-3.0),
            "`frequency_penalty` is -3, allowed: -2 to 2",
        );
        check(
            &params().with_logit_bias([(1, 0.5), (42, 101.0)]),
            "`logit_bias[42]` is 101, allowed: -100 to 100",
        );
        check(
            &params().with_stop(["a", ""]),
            "`stop[1]` is \"\", allowed: a string that is not empty",
        );
        check(
            &params().with_top_logprobs(21),
            "`top_logprobs` is 21, allowed: 0 to 20",
        );
        check(
            &params().with_top_logprobs(5).with_logprobs(false),
            "`top_logprobs` is 5, allowed: 0 while `logprobs` is false",
        );
        check(
            &params().with_timeout_s(0.0),
            "`timeout_s` is 0, allowed: above 0 and at most 31536000",
        );
        check(
            &params().with_queue_timeout_s(f64::NAN),
            "`queue_timeout_s` is NaN, allowed: above 0 and at most 31536000",
        );
    }

    #[test]
    fn the_ends_of_the_ranges_are_valid() {
        check(
            &params()
                .with_temperature(0.0)
                .with_top_p(1.0)
                .with_min_p(1.0)
                .with_max_tokens(1),
            "valid",
        );
        check(
            &params()
                .with_temperature(2.0)
                .with_presence_penalty(-2.0)
                .with_frequency_penalty(2.0),
            "valid",
        );
        check(
            &params()
                .with_logit_bias([(0, -100.0), (1, 100.0)])
                .with_top_logprobs(20),
            "valid",
        );
    }

    #[test]
    fn each_setter_sets_its_field_and_nothing_else() {
        let bias = BTreeMap::from([(7, -1.5)]);
        let constraint = OutputConstraint::Regex("a+".to_owned());
        let choice = ToolChoice::Function("now".to_owned());
        macro_rules! sets {
            ($($setter:ident($given:expr): $field:ident = $value:expr;)*) => {
                $(assert_eq!(params().$setter($given), GenerateParams { $field: $value, ..params() });)*
            };
        }
        sets! {
            with_max_tokens(9): max_tokens = 9;
            with_temperature(0.25): temperature = 0.25;
            with_top_p(0.25): top_p = 0.25;
            with_top_k(9): top_k = 9;
            with_min_p(0.25): min_p = 0.25;
            with_repetition_penalty(1.5): repetition_penalty = 1.5;
            with_repetition_window(9): repetition_window = 9;
            with_presence_penalty(0.25): presence_penalty = 0.25;
            with_frequency_penalty(0.25): frequency_penalty = 0.25;
            with_logit_bias([(7, -1.5)]): logit_bias = bias;
            with_seed(9): seed = Some(9);
            with_stop(["a", "b"]): stop = vec!["a".to_owned(), "b".to_owned()];
            with_stop_tokens([3, 4]): stop_tokens = vec![3, 4];
            with_logprobs(true): logprobs = true;
            with_top_logprobs(0): top_logprobs = 0;
            with_ignore_eos(true): ignore_eos = true;
            with_constraint(constraint.clone()): constraint = Some(constraint);
            with_priority(Priority::High): priority = Priority::High;
            with_queue_timeout_s(1.5): queue_timeout_s = Some(1.5);
            with_timeout_s(1.5): timeout_s = Some(1.5);
            with_tool_choice(choice.clone()): tool_choice = choice;
            with_parallel_tool_calls(false): parallel_tool_calls = false;
            with_tool_format("hermes"): tool_format = Some("hermes".to_owned());
            with_separate_reasoning(false): separate_reasoning = false;
            with_thinking_budget(9): thinking_budget = Some(9);
        }
        let likely = params().with_top_logprobs(3);
        assert_eq!((likely.top_logprobs, likely.logprobs), (3, true));
        // Asking for no alternatives does not turn off what was asked for before.
        assert!(params().with_logprobs(true).with_top_logprobs(0).logprobs);
    }

    #[test]
    fn a_range_ends_where_it_says() {
        type Set = fn(GenerateParams, f32) -> GenerateParams;
        let ranges: [(Set, f32, f32); 6] = [
            (GenerateParams::with_temperature, 0.0, 2.0),
            (GenerateParams::with_top_p, 0f32.next_up(), 1.0),
            (GenerateParams::with_min_p, 0.0, 1.0),
            (GenerateParams::with_repetition_penalty, 0.01, 100.0),
            (GenerateParams::with_presence_penalty, -2.0, 2.0),
            (GenerateParams::with_frequency_penalty, -2.0, 2.0),
        ];
        for (set, least, most) in ranges {
            for inside in [least, most] {
                check(&set(params(), inside), "valid");
            }
            for outside in [least.next_down(), most.next_up()] {
                assert!(set(params(), outside).validate().is_err(), "{outside}");
            }
        }
        let year = GenerateParams::MAX_TIMEOUT_S;
        for set in [
            GenerateParams::with_timeout_s,
            GenerateParams::with_queue_timeout_s,
        ] {
            for (seconds, valid) in [(year, true), (year.next_up(), false), (0.0, false), (1e-9, true)] {
                assert_eq!(set(params(), seconds).validate().is_ok(), valid, "{seconds}");
            }
        }
        check(
            &params().with_repetition_window(1).with_thinking_budget(1),
            "valid",
        );
        check(
            &params().with_thinking_budget(0),
            "`thinking_budget` is 0, allowed: 1 or more",
        );
        check(
            &params().with_thinking_budget(9).with_separate_reasoning(false),
            "`thinking_budget` is 9, allowed: none while `separate_reasoning` is false",
        );
        check(&params().with_separate_reasoning(false), "valid");
    }

    #[test]
    fn greedy_is_what_leaves_chance_nothing() {
        let is_greedy = |temperature| params().with_temperature(temperature).is_greedy();
        let border = GenerateParams::GREEDY_BELOW;
        assert!(is_greedy(0.0) && is_greedy(border.next_down()));
        assert!(!is_greedy(border) && !params().is_greedy());
    }

    #[test]
    fn a_refusal_is_read_in_its_parts() {
        let error = params().with_logit_bias([(42, 101.0)]).validate().unwrap_err();
        assert_eq!(
            (error.field(), error.value(), error.allowed()),
            ("logit_bias[42]", "101", "-100 to 100")
        );
    }

    #[test]
    fn an_empty_object_is_the_defaults() {
        assert_eq!(serde_json::from_str::<GenerateParams>("{}").unwrap(), params());
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let error = serde_json::from_str::<GenerateParams>(r#"{"temprature": 0.5}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown field `temprature`"), "{error}");
    }

    /// Numbers of seconds that survive being written.
    fn milliseconds() -> impl Strategy<Value = Option<f64>> {
        prop::option::of((1u32..1_000_000).prop_map(|ms| f64::from(ms) / 1000.0))
    }

    prop_compose! {
        fn valid_params()(
            (max_tokens, repetition_window, top_k) in (1u32.., 1u32.., any::<u32>()),
            temperature in 0.0f32..=2.0,
            top_p in 0.001f32..=1.0,
            min_p in 0.0f32..=1.0,
            repetition_penalty in 0.01f32..=100.0,
            (presence_penalty, frequency_penalty) in (-2.0f32..=2.0, -2.0f32..=2.0),
            logit_bias in prop::collection::btree_map(any::<u32>(), -100.0f32..=100.0, 0..4),
            seed in any::<Option<u64>>(),
            stop in prop::collection::vec(".{1,8}", 0..4),
            stop_tokens in prop::collection::vec(any::<u32>(), 0..4),
            (top_logprobs, ignore_eos) in (0u8..=20, any::<bool>()),
            priority in prop::sample::select(Priority::ALL.to_vec()),
            (queue_timeout_s, timeout_s) in (milliseconds(), milliseconds()),
        ) -> GenerateParams {
            GenerateParams {
                max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, repetition_window,
                presence_penalty, frequency_penalty, logit_bias, seed, stop, stop_tokens,
                logprobs: top_logprobs > 0, top_logprobs, ignore_eos, priority, queue_timeout_s, timeout_s,
                ..GenerateParams::default()
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_in_range_is_valid_and_round_trips(params in valid_params()) {
            prop_assert_eq!(params.validate(), Ok(()));
            let json = serde_json::to_string(&params).unwrap();
            prop_assert_eq!(serde_json::from_str::<GenerateParams>(&json).unwrap(), params);
        }

        #[test]
        fn validation_never_lets_a_number_that_is_not_finite_through(
            bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
            field in 0usize..7,
            params in valid_params(),
        ) {
            let (params, name) = match field {
                0 => (params.with_temperature(bad), "temperature"),
                1 => (params.with_top_p(bad), "top_p"),
                2 => (params.with_min_p(bad), "min_p"),
                3 => (params.with_repetition_penalty(bad), "repetition_penalty"),
                4 => (params.with_presence_penalty(bad), "presence_penalty"),
                5 => (params.with_frequency_penalty(bad), "frequency_penalty"),
                _ => (params.with_logit_bias([(9, bad)]), "logit_bias[9]"),
            };
            let error = params.validate().unwrap_err();
            prop_assert_eq!(error.field(), name);
        }

        #[test]
        fn validation_refuses_whatever_is_out_of_range(temperature in any::<f32>(), top_p in any::<f32>()) {
            let params = GenerateParams::default().with_temperature(temperature).with_top_p(top_p);
            let allowed = (0.0..=2.0).contains(&temperature) && top_p > 0.0 && top_p <= 1.0;
            prop_assert_eq!(params.validate().is_ok(), allowed);
        }
    }
}
