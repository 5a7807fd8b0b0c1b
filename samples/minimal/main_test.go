package main

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestCheck(t *testing.T) {
	status := http.StatusOK
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status) }))
	defer srv.Close()
	if got := check(srv.URL); got != 0 {
		t.Errorf("a healthy server: %d", got)
	}
	status = http.StatusServiceUnavailable
	if got := check(srv.URL); got != 1 {
		t.Errorf("an unhealthy server: %d", got)
	}
}
