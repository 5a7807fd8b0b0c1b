package registry

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// Hit is a repository that a search has found.
type Hit struct {
	Name        string `json:"name"`
	Description string `json:"description"`
	Stars       int    `json:"star_count"`
	Official    bool   `json:"is_official"`
}

// searchHost answers searches of Docker Hub, by an interface that is older than the registries'.
const searchHost = "index.docker.io"

// SearchHub asks Docker Hub for at most limit repositories that match term.
func (c *Client) SearchHub(ctx context.Context, term string, limit int) ([]Hit, error) {
	ep := Endpoint{Domain: "docker.io", Scheme: "https", Host: searchHost}
	c.transports.name(searchHost, tlsFiles{})
	target := "https://" + searchHost + "/v1/search?" + url.Values{"q": {term}, "n": {strconv.Itoa(limit)}}.Encode()
	resp, err := c.do(ctx, request{ep: ep, method: http.MethodGet, target: target, bare: true})
	if err != nil {
		return nil, &endpointError{ep, err}
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, &endpointError{ep, answerError(resp)}
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, MaxManifest))
	if err != nil {
		return nil, &endpointError{ep, err}
	}
	hits, err := parseHits(raw)
	if err != nil {
		return nil, &endpointError{ep, err}
	}
	return hits, nil
}

func parseHits(raw []byte) ([]Hit, error) {
	var body struct {
		Results []Hit `json:"results"`
	}
	if err := json.Unmarshal(raw, &body); err != nil {
		return nil, fmt.Errorf("the answer to the search is not as it should be: %w", ErrMismatch)
	}
	for i := range body.Results {
		h := &body.Results[i]
		h.Name, h.Description = oneLine(h.Name), oneLine(h.Description) // a terminal would obey the rest
	}
	return body.Results, nil
}
