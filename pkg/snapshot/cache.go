package snapshot

import (
	lru "github.com/hashicorp/golang-lru/v2"
)

// DefaultCacheBytes is the size of a cache for which none is given.
const DefaultCacheBytes = 16 << 20

// cachedPage is what a page costs: itself and about 160 bytes for its key and
// place in the cache.
const cachedPage = pageSize + 160

// Cache holds pages of indexes that were read and found good, the least recently
// used ones making room for new ones. One is meant to serve all indexes of a
// node. It is safe for concurrent use.
type Cache struct {
	pages *lru.Cache[pageKey, *indexPage]
}

// indexID names the content of an index, so that the links of one COW and its
// index in many volumes share their pages.
type indexID [16]byte

type pageKey struct {
	id   indexID
	page uint32
}

// indexPage is never changed once it is in a cache.
type indexPage [pageSize]byte

// NewCache makes a cache that takes about the given number of bytes when full,
// at least one page; 0 or less stands for DefaultCacheBytes.
func NewCache(bytes int64) *Cache {
	if bytes <= 0 {
		bytes = DefaultCacheBytes
	}
	pages, err := lru.New[pageKey, *indexPage](int(max(bytes/cachedPage, 1)))
	if err != nil {
		panic(err) // of a size below 1 only
	}
	return &Cache{pages: pages}
}
