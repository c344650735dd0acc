//! Sequences that are kept after their request, for requests that begin alike.
//!
//! A radix tree over tokens: what two sequences have in common is one path, and is counted once, as it is kept once.
//! Where a model can fork a sequence anywhere, the longest one serves for all its beginnings; where it cannot, forks are
//! kept at the lengths at which they were made.

mod forking;
mod report;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use mlx_engine_core::EngineError;

pub(crate) use self::forking::{Forking, Known, Pair, fork_draft};
pub use self::report::{PrefixCacheReport, PrefixEntry};

/// The node without tokens, from which all begin.
const ROOT: usize = 0;

/// A beginning that one sequence at least has.
#[derive(Debug)]
struct Node<S> {
    parent: usize,
    /// The tokens behind those of the parent.
    edge: Vec<u32>,
    /// Tokens from the root to the end of the edge.
    end: usize,
    /// Bytes that the tokens of the edge take.
    bytes: u64,
    /// By the first token of their edge.
    children: BTreeMap<u32, usize>,
    kept: Option<Kept<S>>,
}

/// A sequence that nobody runs.
#[derive(Debug)]
struct Kept<S> {
    sequence: S,
    /// Bytes that it takes beside those of its path, where the path is in memory more than once.
    extra: u64,
    /// Later is larger.
    used: u64,
    pinned: bool,
}

/// Where tokens leave the tree.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The deepest node of whose edge some tokens match; the root where none does.
    node: usize,
    /// Tokens that match, from the root.
    len: usize,
}

/// The sequences that are kept, up to so many bytes.
#[derive(Debug)]
pub(crate) struct PrefixCache<S> {
    /// `None` is a place that is free.
    nodes: Vec<Option<Node<S>>>,
    max_bytes: u64,
    bytes: u64,
    uses: u64,
    lookups: u64,
    hits: u64,
    reused_tokens: u64,
}

impl<S> PrefixCache<S> {
    pub(crate) fn new(max_bytes: u64) -> Self {
        Self {
            nodes: vec![Some(Node::root())],
            max_bytes,
            bytes: 0,
            uses: 0,
            lookups: 0,
            hits: 0,
            reused_tokens: 0,
        }
    }

    /// Bytes that all may take.
    pub(crate) fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Bytes that all take.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many sequences there are.
    pub(crate) fn len(&self) -> usize {
        self.kept().count()
    }

    /// Sets how many bytes all may take, and gives up what is beyond.
    pub(crate) fn set_max_bytes(&mut self, max_bytes: u64) {
        self.max_bytes = max_bytes;
        self.shrink(max_bytes);
    }

    /// Whether everything is what it should be, as far as that can be seen: what a panic in the middle of a change leaves is
    /// not.
    pub(crate) fn is_sound<M>(&self, model: &M) -> bool
    where
        M: Forking<Sequence = S>,
    {
        let mut bytes = 0;
        for (index, node) in self
            .nodes
            .iter()
            .enumerate()
            .filter_map(|(index, node)| Some((index, node.as_ref()?)))
        {
            let linked = node.children.iter().all(|(first, &child)| {
                self.node(child).is_some_and(|child| {
                    child.parent == index
                        && child.edge.first() == Some(first)
                        && child.end == node.end + child.edge.len()
                })
            });
            let held = index == ROOT
                || self
                    .node(node.parent)
                    .is_some_and(|parent| parent.children.values().any(|&child| child == index));
            let kept = node.kept.as_ref();
            let seen = kept.is_none_or(|kept| model.len(&kept.sequence) >= node.end);
            if !(linked && held && seen) {
                return false;
            }
            bytes += node.bytes + kept.map_or(0, |kept| kept.extra);
        }
        bytes == self.bytes
    }

    /// Bytes that are not given up.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        let mut paths: Vec<usize> = Vec::new();
        let mut bytes = 0;
        for (index, kept) in self.kept().filter(|(_, kept)| kept.pinned) {
            bytes += kept.extra;
            paths.extend(self.path(index));
        }
        paths.sort_unstable();
        paths.dedup();
        bytes
            + paths
                .into_iter()
                .filter_map(|index| self.node(index))
                .map(|node| node.bytes)
                .sum::<u64>()
    }

    /// How many of the tokens some sequence has that is kept.
    pub(crate) fn known(&self, tokens: &[u32]) -> usize {
        self.find(tokens).len
    }

    /// A sequence of its own that has seen as many of the tokens as are known, and how many these are.
    pub(crate) fn fork<M>(&mut self, model: &mut M, tokens: &[u32]) -> Result<Option<(S, usize)>, EngineError>
    where
        M: Forking<Sequence = S>,
    {
        let place = self.find(tokens);
        // What goes on behind the place may be cut there; else what ends before it.
        let below = self.first_kept(place.node).map(|index| (index, place.len));
        let above = self.path(place.node);
        let above = above.filter_map(|index| Some((index, self.node(index)?.end)));
        let candidates: Vec<_> = below
            .into_iter()
            .chain(above.filter(|(_, end)| *end <= place.len))
            .collect();
        for (index, len) in candidates.into_iter().filter(|(_, len)| *len > 0) {
            self.uses += 1;
            let uses = self.uses;
            let Some(kept) = self.node_mut(index).and_then(|node| node.kept.as_mut()) else {
                continue;
            };
            if let Some(fork) = model.fork(&mut kept.sequence, len)? {
                kept.used = uses;
                return Ok(Some((fork, len)));
            }
        }
        Ok(None)
    }

    /// A sequence that is kept and has seen these tokens, and perhaps more.
    pub(crate) fn with(&self, tokens: &[u32]) -> Option<&S> {
        let place = self.find(tokens);
        let index = self
            .first_kept(place.node)
            .filter(|_| place.len == tokens.len())?;
        Some(&self.node(index)?.kept.as_ref()?.sequence)
    }

    /// Counts a look-up that found so many tokens.
    pub(crate) fn count(&mut self, found: usize) {
        self.lookups += 1;
        self.hits += u64::from(found > 0);
        self.reused_tokens += found as u64;
    }

    /// Keeps a sequence that has seen `tokens`, of which it shares the first `shared` with one that was kept or run
    /// before, and gives up those that were used least lately beyond the budget.
    pub(crate) fn keep<M>(&mut self, model: &M, tokens: &[u32], sequence: S, shared: usize)
    where
        M: Forking<Sequence = S>,
    {
        self.insert(model, tokens, sequence, shared, false);
        self.shrink(self.max_bytes);
    }

    fn insert<M>(&mut self, model: &M, tokens: &[u32], sequence: S, shared: usize, pinned: bool)
    where
        M: Forking<Sequence = S>,
    {
        let whole = model.sequence_bytes(tokens.len());
        if tokens.is_empty() || whole > self.max_bytes || self.max_bytes == 0 {
            return;
        }
        self.uses += 1;
        let place = self.find(tokens);
        let anywhere = model.forks_anywhere();
        if place.len == tokens.len() && !pinned {
            let serves = if anywhere {
                self.first_kept(place.node)
            } else {
                Some(place.node).filter(|&index| self.node(index).is_some_and(|node| node.end == place.len))
            };
            let uses = self.uses;
            if let Some(kept) = serves.and_then(|index| self.node_mut(index)?.kept.as_mut()) {
                // What is there serves as well.
                kept.used = uses;
                return;
            }
        }
        let at = self.split(model, place);
        let node = if place.len < tokens.len() {
            self.add(model, at, &tokens[place.len..])
        } else {
            at
        };
        let own = whole.saturating_sub(model.shared_bytes(shared.min(place.len)));
        let added = whole.saturating_sub(model.sequence_bytes(place.len));
        let extra = own.saturating_sub(added);
        let used = self.uses;
        self.bytes += extra;
        if let Some(node) = self.node_mut(node) {
            let before = node.kept.replace(Kept {
                sequence,
                extra,
                used,
                pinned,
            });
            self.bytes -= before.map_or(0, |kept| kept.extra);
        }
        if anywhere {
            // Its beginnings are its own from now on.
            let parents: Vec<_> = self.path(node).skip(1).collect();
            for index in parents {
                let node = self.node(index);
                if node
                    .and_then(|node| node.kept.as_ref())
                    .is_some_and(|kept| !kept.pinned)
                {
                    self.give_up(index);
                }
            }
        }
    }

    /// Keeps what is known of the tokens until it is unpinned; `false` where not all of them are.
    pub(crate) fn pin<M>(&mut self, model: &mut M, tokens: &[u32]) -> Result<bool, EngineError>
    where
        M: Forking<Sequence = S>,
    {
        let Some((sequence, len)) = self.fork(model, tokens)?.filter(|(_, len)| *len == tokens.len()) else {
            return Ok(false);
        };
        self.insert(model, tokens, sequence, len, true);
        self.shrink(self.max_bytes);
        Ok(true)
    }

    /// Lets what was pinned go when its time comes; `false` where these tokens are not pinned.
    pub(crate) fn unpin(&mut self, tokens: &[u32]) -> bool {
        let place = self.find(tokens);
        let node = self
            .node_mut(place.node)
            .filter(|node| node.end == place.len && place.len == tokens.len());
        let kept = node
            .and_then(|node| node.kept.as_mut())
            .filter(|kept| kept.pinned);
        kept.map(|kept| kept.pinned = false).is_some()
    }

    /// Gives up what was used least lately until all takes so many bytes at most.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        while self.bytes > bytes {
            let loose = self.kept().filter(|(_, kept)| !kept.pinned);
            let Some((oldest, _)) = loose.min_by_key(|(_, kept)| kept.used) else {
                return;
            };
            self.give_up(oldest);
        }
    }

    /// Gives up all that is not pinned, and says how many bytes that were.
    pub(crate) fn clear(&mut self) -> u64 {
        let before = self.bytes;
        self.shrink(0);
        before - self.bytes
    }

    /// The tokens and the sequences that are kept.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> impl Iterator<Item = (Vec<u32>, &S)> {
        self.kept()
            .map(|(index, kept)| (self.tokens(index), &kept.sequence))
    }

    /// What there is.
    pub(crate) fn report(&self) -> PrefixCacheReport {
        let entry = |(index, kept): (usize, &Kept<S>)| {
            let bytes = self
                .path(index)
                .filter_map(|index| self.node(index))
                .map(|node| node.bytes);
            let entry = PrefixEntry {
                tokens: self.node(index).map_or(0, |node| node.end),
                bytes: bytes.sum::<u64>() + kept.extra,
                pinned: kept.pinned,
            };
            (kept.used, entry)
        };
        let mut entries: Vec<_> = self.kept().map(entry).collect();
        entries.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
        PrefixCacheReport {
            max_bytes: self.max_bytes,
            bytes: self.bytes,
            lookups: self.lookups,
            hits: self.hits,
            reused_tokens: self.reused_tokens,
            entries: entries.into_iter().map(|(_, entry)| entry).collect(),
        }
    }

    fn node(&self, index: usize) -> Option<&Node<S>> {
        self.nodes.get(index)?.as_ref()
    }

    fn node_mut(&mut self, index: usize) -> Option<&mut Node<S>> {
        self.nodes.get_mut(index)?.as_mut()
    }

    fn kept(&self) -> impl Iterator<Item = (usize, &Kept<S>)> {
        let nodes = self.nodes.iter().enumerate();
        nodes.filter_map(|(index, node)| Some((index, node.as_ref()?.kept.as_ref()?)))
    }

    /// From a node up to the root, which is left out.
    fn path(&self, index: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(index), |&index| Some(self.node(index)?.parent))
            .take_while(|&index| index != ROOT)
    }

    #[cfg(test)]
    fn tokens(&self, index: usize) -> Vec<u32> {
        let mut edges: Vec<_> = self.path(index).filter_map(|index| self.node(index)).collect();
        edges.reverse();
        edges
            .into_iter()
            .flat_map(|node| node.edge.iter().copied())
            .collect()
    }

    fn find(&self, tokens: &[u32]) -> Place {
        let mut place = Place { node: ROOT, len: 0 };
        while let Some(node) = self.node(place.node) {
            if place.len < node.end {
                break;
            }
            let rest = &tokens[place.len..];
            let Some(&child) = rest.first().and_then(|token| node.children.get(token)) else {
                break;
            };
            let edge = self.node(child).map_or(&[][..], |node| &node.edge);
            let len = edge.iter().zip(rest).take_while(|(a, b)| a == b).count();
            place = Place {
                node: child,
                len: place.len + len,
            };
        }
        place
    }

    /// A sequence at or below a node.
    fn first_kept(&self, mut index: usize) -> Option<usize> {
        // Every leaf has one.
        loop {
            let node = self.node(index)?;
            if node.kept.is_some() {
                return Some(index);
            }
            index = *node.children.values().next()?;
        }
    }

    /// The node that ends at a place, for which an edge may have to be cut in two.
    fn split<M: Forking>(&mut self, model: &M, place: Place) -> usize {
        let Some(node) = self.node(place.node).filter(|node| place.len < node.end) else {
            return place.node;
        };
        let (parent, cut) = (node.parent, node.edge.len() - (node.end - place.len));
        let (upper, lower) = (node.edge[..cut].to_vec(), node.edge[cut..].to_vec());
        let (first, behind, end) = (upper[0], lower[0], node.end);
        let before = node.bytes;
        let middle = self.put(Node {
            parent,
            edge: upper,
            end: place.len,
            bytes: 0,
            children: BTreeMap::from([(behind, place.node)]),
            kept: None,
        });
        let lower_bytes = model
            .sequence_bytes(end)
            .saturating_sub(model.sequence_bytes(place.len));
        let upper_bytes = before.saturating_sub(lower_bytes);
        if let Some(node) = self.node_mut(place.node) {
            (node.parent, node.edge, node.bytes) = (middle, lower, before - upper_bytes);
        }
        if let Some(node) = self.node_mut(middle) {
            node.bytes = upper_bytes;
        }
        if let Some(node) = self.node_mut(parent) {
            node.children.insert(first, middle);
        }
        middle
    }

    /// Adds a node behind another.
    fn add<M: Forking>(&mut self, model: &M, parent: usize, edge: &[u32]) -> usize {
        let start = self.node(parent).map_or(0, |node| node.end);
        let end = start + edge.len();
        let bytes = model
            .sequence_bytes(end)
            .saturating_sub(model.sequence_bytes(start));
        let index = self.put(Node {
            parent,
            edge: edge.to_vec(),
            end,
            bytes,
            children: BTreeMap::new(),
            kept: None,
        });
        self.bytes += bytes;
        if let Some(node) = self.node_mut(parent) {
            node.children.insert(edge[0], index);
        }
        index
    }

    fn put(&mut self, node: Node<S>) -> usize {
        if let Some(free) = self.nodes.iter().position(Option::is_none) {
            self.nodes[free] = Some(node);
            free
        } else {
            self.nodes.push(Some(node));
            self.nodes.len() - 1
        }
    }

    /// Gives a sequence up, with what of its path no other needs.
    fn give_up(&mut self, index: usize) {
        if let Some(kept) = self.node_mut(index).and_then(|node| node.kept.take()) {
            self.bytes -= kept.extra;
        }
        let mut index = index;
        while index != ROOT {
            let Some(node) = self.node(index).filter(|node| node.kept.is_none()) else {
                return;
            };
            let parent = node.parent;
            match node.children.len() {
                0 => self.remove(index),
                1 => {
                    self.merge(index);
                    return;
                }
                _ => return,
            }
            index = parent;
        }
    }

    /// Takes a leaf out.
    fn remove(&mut self, index: usize) {
        if let Some(node) = self.nodes[index].take() {
            self.bytes -= node.bytes;
            if let Some(parent) = self.node_mut(node.parent) {
                parent.children.remove(&node.edge[0]);
            }
        }
    }

    /// Joins a node that nothing ends at with the only one behind it.
    fn merge(&mut self, index: usize) {
        let Some(node) = self.nodes[index].take() else {
            return;
        };
        let Some(&child) = node.children.values().next() else {
            return;
        };
        let first = node.edge[0];
        if let Some(lower) = self.node_mut(child) {
            let mut edge = node.edge;
            edge.append(&mut lower.edge);
            lower.edge = edge;
            lower.bytes += node.bytes;
            lower.parent = node.parent;
        }
        if let Some(parent) = self.node_mut(node.parent) {
            parent.children.insert(first, child);
        }
    }
}

impl<S> Node<S> {
    fn root() -> Self {
        Self {
            parent: ROOT,
            edge: Vec::new(),
            end: 0,
            bytes: 0,
            children: BTreeMap::new(),
            kept: None,
        }
    }
}
