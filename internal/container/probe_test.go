package container

import (
	"strings"
	"testing"
)

func TestParseProbe(t *testing.T) {
	for in, want := range map[string]string{
		"http://:8080/health":        "http://localhost:8080/health",
		"http:8080/health?x=1":       "http://localhost:8080/health?x=1",
		"http:8080":                  "http://localhost:8080/",
		"http://localhost":           "http://localhost:80/",
		"http://127.0.0.1:81?q":      "http://127.0.0.1:81/?q",
		"http://[::1]:81/":           "http://[::1]:81/",
		"http://[::1]":               "http://[::1]:80/",
		"tcp://:5432":                "tcp://localhost:5432",
		"tcp:5432":                   "tcp://localhost:5432",
		"curl -f http://:8080":       "",
		"httpd -f":                   "",
		"test -e /tmp/ok || exit 1":  "",
		"ftp://:21":                  "",
		"http://:0/":                 "!needs a port",
		"http:///x":                  "http://localhost:80/x",
		"http:/x":                    "!needs a port",
		"tcp://localhost":            "!needs a port",
		"tcp://:1/x":                 "!no path",
		"tcp:70000":                  "!needs a port",
		"http://:80/ || exit 1":      "!visible ASCII",
		"http://:80/\r\nX: y":        "!visible ASCII",
		"http://:80/ä":               "!visible ASCII",
		"http://db:80/":              "!localhost",
		"http://user@127.0.0.1:80/":  "!localhost",
		"http://::1:80/":             "!localhost",
		"http://[::1:80/":            "!lacks a ]",
		"http://[fe80::1%25lo]:80/":  "!localhost",
		"http://:80/#x":              "!#",
		"https://localhost:443/":     "!https needs a command",
		"http://127.0.0.1:80:90/abc": "!localhost",
	} {
		p, err := ParseProbe([]string{"CMD-SHELL", in})
		got := ""
		switch {
		case err != nil:
			if want == "" || want[0] != '!' || !strings.Contains(err.Error(), want[1:]) {
				t.Errorf("%q: %v, want %q", in, err, want)
			}
			continue
		case p != nil:
			got = p.String()
		}
		if got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	for _, test := range [][]string{nil, {"NONE"}, {"CMD", "http:80", "x"}, {"NONE", "http:80"}} {
		if p, err := ParseProbe(test); p != nil || err != nil {
			t.Errorf("%q: %v %v", test, p, err)
		}
	}
	if p, err := ParseProbe([]string{"CMD", "http:80"}); p == nil || err != nil {
		t.Errorf("CMD: %v %v", p, err)
	}
}

// FuzzParseProbe has checks as an image may bring them: what is taken means the same when it is written out and read again, and has
// nothing in it that could end a line of the request.
func FuzzParseProbe(f *testing.F) {
	for _, s := range []string{"http://:80/x", "tcp:1", "http://[::1]:1/\r\n", "http://a b", "http:80#"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		p, err := ParseProbe([]string{"CMD-SHELL", line})
		if err != nil || p == nil {
			return
		}
		for _, r := range p.String() {
			if r <= ' ' || r > '~' {
				t.Fatalf("%q has %q", p, r)
			}
		}
		again, err := ParseProbe([]string{"CMD", p.String()})
		if err != nil || again == nil || *again != *p {
			t.Fatalf("%q became %+v, %v", line, again, err)
		}
	})
}
