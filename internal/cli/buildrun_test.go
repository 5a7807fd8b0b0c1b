package cli

import (
	"reflect"
	"strings"
	"testing"

	"conex/internal/build"
)

func TestParseSecret(t *testing.T) {
	t.Setenv("CONEX_TEST_TOKEN", "x")
	for _, c := range []struct {
		in, id string
		want   build.Secret
		err    string
	}{
		{"id=a,src=f", "a", build.Secret{File: "f"}, ""},
		{"id=a,source=f", "a", build.Secret{File: "f"}, ""},
		{`type=file,id=a,"src=x,y"`, "a", build.Secret{File: "x,y"}, ""},
		{"id=a", "a", build.Secret{File: "a"}, ""},
		{"id=CONEX_TEST_TOKEN", "CONEX_TEST_TOKEN", build.Secret{Env: "CONEX_TEST_TOKEN"}, ""},
		{"id=CONEX_TEST_TOKEN,type=file", "CONEX_TEST_TOKEN", build.Secret{File: "CONEX_TEST_TOKEN"}, ""},
		{"id=a,env=B", "a", build.Secret{Env: "B"}, ""},
		{"id=a,type=env,src=B", "a", build.Secret{Env: "B"}, ""},
		{"id=a,type=env", "a", build.Secret{Env: "a"}, ""},
		{"src=f", "", build.Secret{}, "secret missing ID"},
		{"id=a,type=vault", "", build.Secret{}, `unsupported secret type "vault"`},
		{"a", "", build.Secret{}, "must be a key=value pair"},
		{"id=a,mode=1", "", build.Secret{}, "unexpected key 'mode'"},
		{`id="a`, "", build.Secret{}, "no list of key=value"},
	} {
		id, s, err := parseSecret(c.in)
		if err != nil || c.err != "" {
			if err == nil || c.err == "" || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", c.in, err, c.err)
			}
			continue
		}
		if id != c.id || s != c.want {
			t.Errorf("%s: %s %+v", c.in, id, s)
		}
	}
}

func TestParseAgent(t *testing.T) {
	t.Setenv("SSH_AUTH_SOCK", "/run/agent")
	for in, want := range map[string]build.Agent{
		"default": {Paths: []string{"/run/agent"}}, "": {Paths: []string{"/run/agent"}}, "x=/a": {Paths: []string{"/a"}}, "x=a,b": {Paths: []string{"a", "b"}},
	} {
		if _, a := parseAgent(in); !reflect.DeepEqual(a, want) {
			t.Errorf("%q: %+v", in, a)
		}
	}
	t.Setenv("SSH_AUTH_SOCK", "")
	if id, a := parseAgent("default"); id != "default" || a.Paths != nil {
		t.Errorf("no agent: %s %+v", id, a)
	}
}

func TestBuildLimits(t *testing.T) {
	r := buildRunFlags{memory: 100, ulimits: list{"nofile=10:20"}}
	var req build.Request
	if err := r.apply(&req); err != nil || *req.Memory.Limit != 100 || *req.Memory.Swap != 200 || req.Ulimits[0].Type != "RLIMIT_NOFILE" || req.Ulimits[0].Hard != 20 {
		t.Errorf("%+v %v", req, err)
	}
	for _, bad := range []buildRunFlags{{memorySwap: "1g"}, {memory: 100, memorySwap: "50"}, {ulimits: list{"what=1"}}, {agents: list{"a=1", "a=2"}}} {
		if err := bad.apply(&build.Request{}); err == nil {
			t.Errorf("%+v: no error", bad)
		}
	}
}
