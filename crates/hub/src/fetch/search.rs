//! Looking for models.

use std::collections::VecDeque;
use std::fmt;

use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::Url;
use reqwest::header::{HeaderMap, LINK};
use serde::{Deserialize, Serialize};

use super::Hub;
use super::http::{Http, header, spoken};
use super::info::Gated;
use super::progress::FetchEvent;
use crate::HubError;
use crate::error::Result;

/// The most models that the hub puts on a page.
const PAGE: usize = 100;

/// What to look for.
#[derive(Clone, Debug, Default)]
pub struct HubQuery {
    /// Words in the id.
    pub text: Option<String>,
    /// Whose they are.
    pub author: Option<String>,
    /// What they are marked with, such as `mlx` or `text-generation`; all of them.
    pub tags: Vec<String>,
    /// The order, the most first; the hub's own unless told.
    pub sort: Option<HubSort>,
    /// The most models.
    pub limit: Option<usize>,
}

/// An order of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HubSort {
    /// By downloads in the last month.
    Downloads,
    /// By likes.
    Likes,
    /// By the last change.
    LastModified,
    /// By the first upload.
    Created,
    /// By what is new and much looked at.
    Trending,
}

impl fmt::Display for HubSort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Downloads => "downloads",
            Self::Likes => "likes",
            Self::LastModified => "lastModified",
            Self::Created => "createdAt",
            Self::Trending => "trendingScore",
        })
    }
}

/// A model in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ModelSummary {
    /// Its id.
    pub id: String,
    /// Downloads in the last month.
    pub downloads: Option<u64>,
    /// How many like it.
    pub likes: Option<u64>,
    /// What it is for, such as `text-generation`.
    pub pipeline_tag: Option<String>,
    /// The library that it is made for, such as `mlx`.
    pub library: Option<String>,
    /// Everything that it is marked with.
    pub tags: Vec<String>,
    /// When it changed last, as the hub writes it.
    pub last_modified: Option<String>,
    /// Whether only some may see it.
    pub private: bool,
    /// Whether its terms have to be accepted first.
    pub gated: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSummary {
    id: String,
    downloads: Option<u64>,
    likes: Option<u64>,
    #[serde(rename = "pipeline_tag")]
    pipeline_tag: Option<String>,
    #[serde(rename = "library_name")]
    library_name: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    last_modified: Option<String>,
    #[serde(default)]
    private: bool,
    #[serde(default)]
    gated: Gated,
}

impl From<RawSummary> for ModelSummary {
    fn from(raw: RawSummary) -> Self {
        Self {
            id: raw.id,
            downloads: raw.downloads,
            likes: raw.likes,
            pipeline_tag: raw.pipeline_tag,
            library: raw.library_name,
            tags: raw.tags,
            last_modified: raw.last_modified,
            private: raw.private,
            gated: raw.gated.is_gated(),
        }
    }
}

/// How far a search has come.
struct Pages {
    hub: Hub,
    next: Option<Url>,
    page: VecDeque<RawSummary>,
    left: usize,
    tell: Box<dyn Fn(FetchEvent) + Send + Sync>,
}

impl Hub {
    /// Looks for models; pages are asked for as the stream is read. It ends after an error.
    ///
    /// # Errors
    ///
    /// [`HubError::Offline`] and [`HubError::NoRuntime`]; the stream's are what the network says.
    pub fn search(&self, query: &HubQuery) -> Result<BoxStream<'static, Result<ModelSummary>>> {
        self.search_with(query, |_| {})
    }

    /// As [`search`](Self::search); `tell` hears of tries that fail ([`FetchEvent::Retrying`]).
    ///
    /// # Errors
    ///
    /// As [`search`](Self::search).
    pub fn search_with(
        &self,
        query: &HubQuery,
        tell: impl Fn(FetchEvent) + Send + Sync + 'static,
    ) -> Result<BoxStream<'static, Result<ModelSummary>>> {
        let mut url = self.http("search")?.url(["api", "models"]);
        let limit = query.limit.unwrap_or(usize::MAX);
        {
            let mut pairs = url.query_pairs_mut();
            if let Some(text) = &query.text {
                pairs.append_pair("search", text);
            }
            if let Some(author) = &query.author {
                pairs.append_pair("author", author);
            }
            for tag in &query.tags {
                pairs.append_pair("filter", tag);
            }
            if let Some(sort) = query.sort {
                pairs.append_pair("sort", &sort.to_string());
                pairs.append_pair("direction", "-1");
            }
            pairs.append_pair("limit", &limit.min(PAGE).to_string());
        }
        let pages = Pages {
            hub: self.clone(),
            next: Some(url),
            page: VecDeque::new(),
            left: limit,
            tell: Box::new(tell),
        };
        Ok(futures::stream::try_unfold(pages, |mut pages| async move {
            let next = pages.step().await?;
            Ok(next.map(|model| (model, pages)))
        })
        .boxed())
    }
}

impl Pages {
    async fn step(&mut self) -> Result<Option<ModelSummary>> {
        if self.left == 0 {
            return Ok(None);
        }
        loop {
            if let Some(raw) = self.page.pop_front() {
                self.left -= 1;
                return Ok(Some(raw.into()));
            }
            let Some(url) = self.next.take() else {
                return Ok(None);
            };
            let http = self.hub.http("search")?;
            let (page, headers) = http
                .json::<VecDeque<RawSummary>>(&url, "search", &*self.tell)
                .await?;
            // An empty page that names another could go on for ever.
            if !page.is_empty() {
                self.next = next_page(http, &url, &headers)?;
            }
            self.page = page;
        }
    }
}

/// The address of the page behind one, which is the hub's too.
fn next_page(http: &Http, url: &Url, headers: &HeaderMap) -> Result<Option<Url>> {
    let Some(links) = header(headers, LINK.as_str()) else {
        return Ok(None);
    };
    let next = links.split(',').find(|link| link.contains("rel=\"next\""));
    let Some(link) = next.and_then(|link| link.split_once('<')?.1.split_once('>')) else {
        return Ok(None);
    };
    match url.join(link.0) {
        Ok(next) if http.is_hub(&next) => Ok(Some(next)),
        _ => Err(HubError::Answer {
            url: spoken(url),
            why: "its next page is somewhere else".to_owned(),
        }),
    }
}
