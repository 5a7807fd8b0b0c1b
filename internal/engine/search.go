package engine

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	apir "github.com/moby/moby/api/types/registry"

	"conex/internal/image"
	"conex/internal/registry"
)

// Bounds of --limit, as Docker has them.
const (
	defaultSearch = 25
	maxSearch     = 100
)

// SearchRequest looks for repositories.
type SearchRequest struct {
	// Term is a part of a repository's name; localhost:5000/term asks that registry's catalog, a term alone Docker Hub's search.
	Term string
	// Limit bounds the results, 0 is 25.
	Limit int
	// Filters are is-official, is-automated and stars.
	Filters map[string][]string
}

// Search returns the repositories that match, those with most stars first, then by name.
func (e *Engine) Search(ctx context.Context, req SearchRequest) ([]apir.SearchResult, error) {
	if req.Limit == 0 {
		req.Limit = defaultSearch
	}
	if req.Limit < 1 || req.Limit > maxSearch {
		return nil, invalid("limit %d is outside the range of [1, %d]", req.Limit, maxSearch)
	}
	keep, err := searchFilter(req.Filters)
	if err != nil {
		return nil, err
	}
	client := e.registryClient()
	defer client.Close()
	var found []apir.SearchResult
	domain, term := searchDomain(req.Term)
	if domain == image.DefaultDomain {
		hits, err := client.SearchHub(ctx, term, req.Limit)
		if err != nil {
			return nil, fmt.Errorf("search %s: %w", req.Term, err)
		}
		for _, h := range hits {
			r := apir.SearchResult{Name: h.Name, Description: h.Description, StarCount: h.Stars, IsOfficial: h.Official}
			if keep(r) {
				found = append(found, r)
			}
		}
	} else {
		err := client.Catalog(ctx, domain, func(name string) bool {
			r := apir.SearchResult{Name: domain + "/" + name}
			if strings.Contains(name, term) && keep(r) {
				found = append(found, r)
			}
			return len(found) < req.Limit
		})
		if err != nil {
			return nil, fmt.Errorf("search %s: %w", req.Term, registry.Cause(err))
		}
	}
	slices.SortStableFunc(found, func(a, b apir.SearchResult) int {
		return cmp.Or(cmp.Compare(b.StarCount, a.StarCount), cmp.Compare(a.Name, b.Name))
	})
	return found[:min(len(found), req.Limit)], nil
}

// searchDomain tells the registry's name, which a dot, a colon or "localhost" gives away, from the term.
func searchDomain(term string) (domain, rest string) {
	first, after, slash := strings.Cut(term, "/")
	if first == "localhost" || strings.ContainsAny(first, ".:") && (slash || strings.Contains(first, ":")) {
		switch first {
		case "docker.io", "index.docker.io":
			return image.DefaultDomain, after
		}
		return first, after
	}
	return image.DefaultDomain, term
}

func searchFilter(filters map[string][]string) (keep func(apir.SearchResult) bool, err error) {
	stars, official, automated := 0, "", ""
	for k, values := range filters {
		for _, v := range values {
			switch k {
			case "stars":
				n, err := strconv.Atoi(v)
				if err != nil {
					return nil, invalid("invalid filter 'stars=%s'", v)
				}
				stars = max(stars, n)
			case "is-official", "is-automated":
				b, err := strconv.ParseBool(v)
				if err != nil {
					return nil, invalid("invalid filter '%s=%s'", k, v)
				}
				if k == "is-official" {
					official = strconv.FormatBool(b)
				} else {
					automated = strconv.FormatBool(b)
				}
			default:
				return nil, invalid("invalid filter '%s'", k)
			}
		}
	}
	return func(r apir.SearchResult) bool {
		return r.StarCount >= stars && (official == "" || official == strconv.FormatBool(r.IsOfficial)) && automated != "true"
	}, nil
}
