package registry

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
)

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestSearchHub(t *testing.T) {
	c := client(nil)
	status, body := 200, `{"num_results":2,"results":[{"name":"nginx","description":"Official\u001b[2J build","star_count":7,"is_official":true},{"name":"a/nginx"}]}`
	c.http.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
		if r.URL.String() != "https://index.docker.io/v1/search?n=5&q=nginx+x" {
			t.Errorf("asked for %s", r.URL)
		}
		return &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
	})
	hits, err := c.SearchHub(context.Background(), "nginx x", 5)
	if err != nil || len(hits) != 2 || hits[0] != (Hit{"nginx", "Official [2J build", 7, true}) || hits[1].Name != "a/nginx" {
		t.Fatalf("%+v, %v", hits, err)
	}
	for _, body = range []string{"<html>", `{"results":{}}`} {
		if _, err := c.SearchHub(context.Background(), "nginx x", 5); err == nil || !strings.Contains(err.Error(), searchHost) {
			t.Errorf("%s: %v", body, err)
		}
	}
	status = 503
	if _, err := c.SearchHub(context.Background(), "nginx x", 5); err == nil || !strings.Contains(err.Error(), "503") {
		t.Error(err)
	}
}

// TestInsecure has a registry whose certificate nobody vouches for, and one without TLS that is not a loopback address by name.
func TestInsecure(t *testing.T) {
	c := New(Options{Insecure: true})
	eps, err := c.endpoints("registry.example:5000")
	if err != nil || len(eps) != 2 || eps[0].Scheme != "https" || eps[1].Scheme != "http" || !c.transports.files["registry.example:5000"].skip {
		t.Errorf("%v, %v", eps, err)
	}
}
