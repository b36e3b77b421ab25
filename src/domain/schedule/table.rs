//! Values with a name and a number: found by name once, by number from then on.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::ops::{Index, IndexMut};

/// Values by name and by place. A place stays valid until [`Table::retain`] drops it.
pub struct Table<K, V> {
    places: HashMap<K, usize>,
    values: Vec<V>,
    free: Vec<usize>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { places: HashMap::new(), values: Vec::new(), free: Vec::new() }
    }
}

impl<K: Hash + Eq, V> Table<K, V> {
    /// The place of the value of that name, which is made if there is none.
    pub fn place<Q>(&mut self, name: &Q, make: impl FnOnce() -> V) -> usize
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        if let Some(place) = self.places.get(name) {
            return *place;
        }
        let place = match self.free.pop() {
            Some(place) => {
                self.values[place] = make();
                place
            }
            None => {
                self.values.push(make());
                self.values.len() - 1
            }
        };
        self.places.insert(name.to_owned(), place);
        place
    }

    /// Names, and the places of their values.
    pub fn places(&self) -> impl Iterator<Item = (&K, usize)> {
        self.places.iter().map(|(name, place)| (name, *place))
    }

    /// Whether there is a value at a place.
    pub fn is_used(&self, place: usize) -> bool {
        place < self.values.len() && !self.free.contains(&place)
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Drops the values that are not to be kept; their places go to others.
    pub fn retain(&mut self, keep: impl Fn(usize, &V) -> bool) {
        let (values, free) = (&self.values, &mut self.free);
        self.places.retain(|_, place| {
            let kept = keep(*place, &values[*place]);
            if !kept {
                free.push(*place);
            }
            kept
        });
    }
}

impl<K, V> Index<usize> for Table<K, V> {
    type Output = V;

    fn index(&self, place: usize) -> &V {
        &self.values[place]
    }
}

impl<K, V> IndexMut<usize> for Table<K, V> {
    fn index_mut(&mut self, place: usize) -> &mut V {
        &mut self.values[place]
    }
}
