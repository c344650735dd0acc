//! Spans of requests and steps, sent to a collector by OTLP.
//!
//! Every request is a span with the fields of [OpenTelemetry's conventions for generative AI][conventions] (`gen_ai.request.model`,
//! `gen_ai.usage.output_tokens` and so on), every step of the engine one with the answers that it took further and the tokens
//! that it fed and read. A step serves many requests, so that it is no part of one.
//!
//! [conventions]: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/

use std::sync::Arc;
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::SdkTracerProvider;
use reqwest::Url;
use rustls_platform_verifier::BuilderVerifierExt;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

/// Where spans go, and which.
///
/// ```no_run
/// use mlx_engine::otlp::{Otlp, OtlpOptions};
///
/// # fn run() -> Result<(), mlx_engine::otlp::OtlpError> {
/// let otlp = Otlp::start(&OtlpOptions::new("http://localhost:4318"))?;
/// otlp.install()?;
/// // What the program is for.
/// otlp.shutdown()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct OtlpOptions {
    /// The address of the collector for OTLP over HTTP, such as `http://localhost:4318`. Where it has no path, it gets
    /// `/v1/traces`.
    pub endpoint: String,
    /// The name of the service that the spans are of.
    pub service_name: String,
    /// Whether steps are sent too, of which there is one for each token: requests alone otherwise.
    pub steps: bool,
    /// How long the collector may take.
    pub timeout: Duration,
}

impl OtlpOptions {
    /// Requests and steps, sent to a collector as those of the service `mlx-engine`, which may take 10 seconds.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            service_name: "mlx-engine".to_owned(),
            steps: true,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Why no spans are sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OtlpError {
    /// The address is none.
    #[error("`{endpoint}` is no address of a collector: {why}; one is `http://localhost:4318`")]
    Endpoint {
        /// The address.
        endpoint: String,
        /// What is wrong with it.
        why: String,
    },
    /// The connection cannot be made.
    #[error("nothing can be sent to the collector: {0}")]
    Transport(String),
    /// The process has a subscriber of its own.
    #[error("this process has a subscriber of `tracing` already: add `Otlp::layer` to that one")]
    Installed,
    /// The collector did not get them all.
    #[error("the last spans could not be sent")]
    Lost(#[source] OTelSdkError),
}

/// Sends spans, in batches and on a thread of its own. Dropping it loses what waits to be sent:
/// [`shutdown`](Self::shutdown) does not.
#[derive(Debug)]
pub struct Otlp {
    provider: SdkTracerProvider,
    level: LevelFilter,
}

impl Otlp {
    /// Gets ready to send. That nobody listens there is found when something is sent.
    ///
    /// # Errors
    ///
    /// [`OtlpError::Endpoint`] and [`OtlpError::Transport`].
    pub fn start(options: &OtlpOptions) -> Result<Self, OtlpError> {
        let exporter = SpanExporter::builder()
            .with_http()
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(endpoint(&options.endpoint)?)
            .with_timeout(options.timeout)
            .with_http_client(client(options.timeout)?)
            .build()
            .map_err(|error| OtlpError::Transport(error.to_string()))?;
        let resource = Resource::builder().with_service_name(options.service_name.clone());
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource.build())
            .build();
        let level = if options.steps {
            LevelFilter::DEBUG
        } else {
            LevelFilter::INFO
        };
        Ok(Self { provider, level })
    }

    /// A layer for the subscriber of a program that has one: the spans of the engine, and no others.
    pub fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let ours = Targets::new().with_target("mlx_engine", self.level);
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("mlx-engine"))
            .with_filter(ours)
    }

    /// Makes it the subscriber of the process.
    ///
    /// # Errors
    ///
    /// [`OtlpError::Installed`] where there is one.
    pub fn install(&self) -> Result<(), OtlpError> {
        let subscriber = tracing_subscriber::registry().with(self.layer());
        tracing::subscriber::set_global_default(subscriber).map_err(|_| OtlpError::Installed)
    }

    /// Sends what waits, and nothing more from then on. It blocks as long as the collector may take.
    ///
    /// # Errors
    ///
    /// [`OtlpError::Lost`].
    pub fn shutdown(self) -> Result<(), OtlpError> {
        self.provider.shutdown().map_err(OtlpError::Lost)
    }
}

/// The address that spans are posted to.
fn endpoint(given: &str) -> Result<String, OtlpError> {
    let refused = |why: &str| OtlpError::Endpoint {
        endpoint: given.to_owned(),
        why: why.to_owned(),
    };
    let mut url = Url::parse(given).map_err(|error| refused(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(refused("it is neither http nor https"));
    }
    if matches!(url.path(), "" | "/") {
        url.set_path("/v1/traces");
    }
    Ok(url.into())
}

fn client(timeout: Duration) -> Result<reqwest::blocking::Client, OtlpError> {
    let fail = |why: String| OtlpError::Transport(why);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| fail(error.to_string()))?;
    let tls = match builder.clone().with_platform_verifier() {
        Ok(builder) => builder.with_no_client_auth(),
        // A machine without certificates still reaches a collector that has none.
        Err(_) => builder
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth(),
    };
    // It brings a runtime along, and one must not be begun within another.
    let client = std::thread::spawn(move || {
        reqwest::blocking::Client::builder()
            .tls_backend_preconfigured(tls)
            .timeout(timeout)
            .build()
    });
    let client = client
        .join()
        .map_err(|_| fail("the connection panicked".to_owned()))?;
    client.map_err(|error| fail(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_the_path_of_traces_unless_it_has_one() {
        for (given, expected) in [
            ("http://localhost:4318", "http://localhost:4318/v1/traces"),
            ("https://collector/", "https://collector/v1/traces"),
            (
                "http://collector/otlp/v1/traces",
                "http://collector/otlp/v1/traces",
            ),
        ] {
            assert_eq!(endpoint(given).unwrap(), expected);
        }
        for wrong in ["localhost:4318", "", "file:///tmp/x"] {
            assert!(
                matches!(endpoint(wrong), Err(OtlpError::Endpoint { .. })),
                "{wrong}"
            );
        }
    }
}
