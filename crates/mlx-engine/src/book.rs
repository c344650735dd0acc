//! The pages of the book and the README, so that what they show compiles and runs as a test of the documentation.

macro_rules! pages {
    ($($page:ident = $path:literal;)*) => {$(
        #[doc = include_str!(concat!("../../../", $path))]
        struct $page;
    )*};
}

pages! {
    Readme = "README.md";
    QuickStart = "docs/quick-start.md";
    Chat = "docs/guide/chat.md";
    Stream = "docs/guide/stream.md";
    Batching = "docs/guide/batching.md";
    Choosing = "docs/guide/choosing.md";
    Monitoring = "docs/guide/monitoring.md";
    Recovery = "docs/guide/recovery.md";
    Caching = "docs/guide/caching.md";
    Optimize = "docs/guide/optimize.md";
    Service = "docs/guide/service.md";
    Desktop = "docs/guide/desktop.md";
    CommandLine = "docs/guide/command-line.md";
    Mock = "docs/guide/mock.md";
    Linux = "docs/guide/linux.md";
    Apple = "docs/guide/apple.md";
}

#[cfg(feature = "grammar")]
pages! {
    Tools = "docs/guide/tools.md";
}

#[cfg(feature = "schemars")]
pages! {
    Structured = "docs/guide/structured.md";
}

#[cfg(feature = "mlx")]
pages! {
    Converting = "docs/guide/convert.md";
}
