//! Requests: redirects followed by hand, the token kept at home, every status looked at, every answer bounded.

use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, ETAG, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Response, StatusCode, Url};
use rustls_platform_verifier::BuilderVerifierExt;
use serde::de::DeserializeOwned;

use super::progress::{FetchEvent, Listener};
use super::retry::Backoff;
use super::{HubOptions, HubSystem};
use crate::error::Result;
use crate::names::shown;
use crate::{HubError, Token};

const USER_AGENT: &str = concat!("mlx-engine/", env!("CARGO_PKG_VERSION"));
const MAX_REDIRECTS: usize = 10;
/// The longest answer that is kept in memory: the info of a repository with very many files.
const MAX_ANSWER: usize = 64 << 20;
/// As much of an error's body is read.
const MAX_COMPLAINT: usize = 8 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// The network, as far as it is the hub's.
#[derive(Debug)]
pub(super) struct Http {
    client: reqwest::Client,
    pub(super) endpoint: Url,
    token: Option<Token>,
    idle: Duration,
    retries: usize,
    system: Arc<dyn HubSystem>,
}

/// An answer, and what the hub said on the way to it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    /// The `ETag` of the file that the hub named, which is the hash of its content.
    pub(super) etag: Option<String>,
}

impl Http {
    pub(super) fn new(endpoint: Url, options: &HubOptions) -> Result<Self> {
        let fail = |why: String| HubError::Tls { why };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| fail(error.to_string()))?;
        let tls = match builder.clone().with_platform_verifier() {
            Ok(builder) => builder.with_no_client_auth(),
            // A machine without certificates still reaches a mirror that has none.
            Err(_) if endpoint.scheme() == "http" => builder
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth(),
            Err(error) => return Err(fail(error.to_string())),
        };
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            // Followed by hand, so that the hub's own headers are seen, and the token stays with the hub.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(USER_AGENT)
            .build()
            .map_err(|error| fail(error.to_string()))?;
        Ok(Self {
            client,
            endpoint,
            token: options.environment.token.clone(),
            idle: options.idle_timeout,
            retries: options.retries,
            system: Arc::clone(&options.system),
        })
    }

    /// The address of a path below the endpoint; each part is escaped.
    pub(super) fn url<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url
    }

    /// Whether an address is the hub's, so that it may see the token.
    pub(super) fn is_hub(&self, url: &Url) -> bool {
        url.origin() == self.endpoint.origin()
    }

    /// Asks for an address, from a byte on. The status of the answer is a good one, or 416 where a byte was named.
    /// `what` is what is asked for, for errors.
    pub(super) async fn get(&self, url: &Url, from: u64, what: &str) -> Result<Answer> {
        let mut here = url.clone();
        let mut etag = None;
        let mut with_token = false;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self
                .client
                .get(here.clone())
                // The bytes themselves: a range of something compressed is no range of the file.
                .header(ACCEPT_ENCODING, "identity");
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            let is_hub = self.is_hub(&here);
            let token = self.token.as_ref().filter(|_| is_hub);
            if let Some(token) = token {
                let value = HeaderValue::try_from(format!("Bearer {}", token.reveal()));
                let mut value = value.map_err(|_| HubError::InvalidName {
                    what: "token",
                    name: "…".to_owned(),
                    why: "it holds characters that a header cannot",
                })?;
                value.set_sensitive(true);
                request = request.header(AUTHORIZATION, value);
                with_token = true;
            }
            let response = self.in_time(&here, request.send()).await?;
            let headers = response.headers();
            if is_hub && etag.is_none() {
                etag = header(headers, "x-linked-etag")
                    .or_else(|| header(headers, ETAG.as_str()).filter(|_| response.status().is_success()))
                    .map(|etag| plain_etag(&etag));
            }
            let status = response.status();
            if status.is_redirection() && status != StatusCode::NOT_MODIFIED {
                here = follow(&here, &response)?;
                continue;
            }
            if status.is_success() || (status == StatusCode::RANGE_NOT_SATISFIABLE && from > 0) {
                return Ok(Answer { response, etag });
            }
            return Err(self.refused(response, what, with_token).await);
        }
        Err(HubError::Redirect {
            url: spoken(url),
            why: "it leads to more than 10 others",
        })
    }

    /// Asks for JSON, trying again what may pass. Returns the headers too.
    pub(super) async fn json<T: DeserializeOwned>(
        &self,
        url: &Url,
        what: &str,
        tell: Listener<'_>,
    ) -> Result<(T, HeaderMap)> {
        let (body, headers) = self.body(url, what, MAX_ANSWER, tell).await?;
        let value = serde_json::from_slice(&body).map_err(|error| HubError::Answer {
            url: spoken(url),
            why: error.to_string(),
        })?;
        Ok((value, headers))
    }

    /// Asks for a short answer, trying again what may pass. Returns the headers too.
    pub(super) async fn body(
        &self,
        url: &Url,
        what: &str,
        most: usize,
        tell: Listener<'_>,
    ) -> Result<(Vec<u8>, HeaderMap)> {
        let mut backoff = self.backoff();
        loop {
            let error = match self.body_once(url, what, most).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let Some(after) = backoff.next(&error) else {
                return Err(error);
            };
            tracing::info!(what, %error, ?after, "asking the hub again");
            tell(FetchEvent::Retrying {
                file: what.to_owned(),
                reason: error.to_string(),
                after,
            });
            self.system.sleep(after).await;
        }
    }

    async fn body_once(&self, url: &Url, what: &str, most: usize) -> Result<(Vec<u8>, HeaderMap)> {
        let Answer { mut response, .. } = self.get(url, 0, what).await?;
        let mut body = Vec::new();
        while let Some(chunk) = self.chunk(url, &mut response).await? {
            if body.len() + chunk.len() > most {
                return Err(HubError::Answer {
                    url: spoken(url),
                    why: format!("it is longer than {most} bytes"),
                });
            }
            body.extend_from_slice(&chunk);
        }
        Ok((body, std::mem::take(response.headers_mut())))
    }

    pub(super) fn backoff(&self) -> Backoff {
        Backoff::new(self.retries, self.system.seed())
    }

    /// The next bytes of an answer.
    pub(super) async fn chunk(&self, url: &Url, response: &mut Response) -> Result<Option<Bytes>> {
        self.in_time(url, response.chunk()).await
    }

    /// Waits for something, but not longer than a server may be silent.
    async fn in_time<T>(&self, url: &Url, work: impl Future<Output = reqwest::Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            // The address in it may hold what grants access.
            done = work => done.map_err(|error| failed(url, error.without_url())),
            () = self.system.sleep(self.idle) => Err(HubError::Stalled { url: spoken(url), limit: self.idle }),
        }
    }

    /// The error of a bad status.
    async fn refused(&self, mut response: Response, what: &str, with_token: bool) -> HubError {
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let code = header(&headers, "x-error-code").unwrap_or_default();
        let retry_after = header(&headers, RETRY_AFTER.as_str()).and_then(|text| self.retry_after(&text));
        let url = response.url().clone();
        let message = match header(&headers, "x-error-message") {
            Some(message) => shown(&message),
            None => self.complaint(&url, &mut response).await,
        };
        let what = what.to_owned();
        match (status, code.as_str()) {
            // Who may not see a repository is told that there is none, under 401.
            (404, _) | (401, "RepoNotFound") => HubError::NotFound { what, message },
            (401 | 403, _) => HubError::Denied {
                what,
                status,
                with_token,
                message,
            },
            (429, _) => HubError::RateLimited { retry_after, message },
            _ => HubError::Status {
                url: spoken(&url),
                status,
                retry_after,
                message,
            },
        }
    }

    /// What the body of an error says, where it says it in a few words.
    async fn complaint(&self, url: &Url, response: &mut Response) -> String {
        let mut body = Vec::new();
        // A body that breaks off says what it said.
        while let Ok(Some(chunk)) = self.chunk(url, response).await {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_COMPLAINT {
                break;
            }
        }
        let json: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
        if let Some(error) = json.as_ref().and_then(|json| json.get("error")?.as_str()) {
            return shown(error);
        }
        let text = String::from_utf8_lossy(&body);
        let text = text.trim();
        // A page for people is none for an error.
        if text.starts_with('<') {
            String::new()
        } else {
            shown(text)
        }
    }

    /// `Retry-After`, in seconds or as a date.
    fn retry_after(&self, text: &str) -> Option<Duration> {
        if let Ok(seconds) = text.trim().parse() {
            return Some(Duration::from_secs(seconds));
        }
        let date = httpdate::parse_http_date(text.trim()).ok()?;
        Some(date.duration_since(self.system.time_of_day()).unwrap_or_default())
    }
}

/// Why a request failed: a certificate that is not believed is not believed the next time.
fn failed(url: &Url, error: reqwest::Error) -> HubError {
    let url = spoken(url);
    if is_about_a_certificate(&error) {
        let source = error.into();
        return HubError::Untrusted { url, source };
    }
    HubError::Transport {
        url,
        source: error.into(),
    }
}

fn is_about_a_certificate(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return matches!(error, rustls::Error::InvalidCertificate(_));
        }
        // An error of input and output has for its source that of what it holds.
        let held = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        next = held
            .map(|held| held as &(dyn Error + 'static))
            .or_else(|| error.source());
    }
    false
}

/// Where a redirect leads.
fn follow(from: &Url, response: &Response) -> Result<Url> {
    let refuse = |why| HubError::Redirect {
        url: spoken(from),
        why,
    };
    let location =
        header(response.headers(), LOCATION.as_str()).ok_or_else(|| refuse("it names no address"))?;
    let to = from.join(&location).map_err(|_| refuse("its address is none"))?;
    match (from.scheme(), to.scheme()) {
        ("https", "https") | ("http", "http" | "https") => Ok(to),
        _ => Err(refuse("it leaves https")),
    }
}

/// A header as text.
pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// An `ETag` without its quotes and the mark of a weak one.
fn plain_etag(etag: &str) -> String {
    etag.trim_start_matches("W/").trim_matches('"').to_owned()
}

/// An address for a message: without a name, a password and a query, which may grant access.
pub(super) fn spoken(url: &Url) -> String {
    let mut url = url.clone();
    // They fail for addresses that have none.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}
