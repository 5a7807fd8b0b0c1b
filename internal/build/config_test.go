package build

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"conex/internal/dockerfile"
	"conex/internal/image"
)

func ptr(s string) *string { return &s }

// TestConfig checks what instructions leave in the image's config, as JSON of the part that matters.
func TestConfig(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	e.must("FROM scratch\nCOPY a /\nENV BASE=1 PATH=/p\nENTRYPOINT [\"/base\"]\nCMD [\"x\"]\nLABEL l=base\nEXPOSE 1\nWORKDIR /base\nUSER 7\n",
		e.tag("base"))
	bare := e.must("FROM scratch\nCOPY a /\nENV PATH=/p\n").Config
	bare.Config.WorkingDir = ""
	raw, err := json.Marshal(bare)
	if err != nil {
		t.Fatal(err)
	}
	img, err := e.images.Add(t.Context(), raw, "", "")
	if err != nil {
		t.Fatal(err)
	}
	ref, err := image.ParseReference("bare")
	if err != nil {
		t.Fatal(err)
	}
	if err := e.images.Tag(img.ID, ref); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, file, want string }{
		{"env", "FROM scratch\nENV A=1 B=\"two words\"\nENV C $A-$B\nENV A=3", `"Env":["PATH=` + defaultPath + `","A=3","B=two words","C=1-two words"],"WorkingDir":"/"`},
		{"env substitution", "FROM scratch\nENV A=${X:-def} B=${BASE:+alt} C=\\$A", `"Env":["PATH=` + defaultPath + `","A=def","B=","C=$A"],"WorkingDir":"/"`},
		{"inherits", "FROM base", `"User":"7","ExposedPorts":{"1/tcp":{}},"Env":["PATH=/p","BASE=1"],"Entrypoint":["/base"],"Cmd":["x"],"WorkingDir":"/base","Labels":{"l":"base"}`},
		{"entrypoint resets cmd", "FROM base\nENTRYPOINT [\"/e\"]", `"User":"7","ExposedPorts":{"1/tcp":{}},"Env":["PATH=/p","BASE=1"],"Entrypoint":["/e"],"WorkingDir":"/base","Labels":{"l":"base"}`},
		{"cmd before entrypoint", "FROM base\nCMD [\"c\"]\nENTRYPOINT /e f", `"User":"7","ExposedPorts":{"1/tcp":{}},"Env":["PATH=/p","BASE=1"],"Entrypoint":["/bin/sh","-c","/e f"],"Cmd":["c"],"WorkingDir":"/base","Labels":{"l":"base"}`},
		{"shell", "FROM scratch\nSHELL [\"/bin/bash\",\"-ec\"]\nCMD a  b", `"Env":["PATH=` + defaultPath + `"],"Cmd":["/bin/bash","-ec","a  b"],"WorkingDir":"/","Shell":["/bin/bash","-ec"]`},
		{"ports", "FROM scratch\nARG P=90\nEXPOSE 80 53/UDP $P 8000-8001", `"ExposedPorts":{"53/udp":{},"80/tcp":{},"8000/tcp":{},"8001/tcp":{},"90/tcp":{}},"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/"`},
		{"volume, user, signal", "FROM scratch\nVOLUME /a /b\nVOLUME [\"/c\"]\nUSER 1:2\nSTOPSIGNAL SIGQUIT", `"User":"1:2","Env":["PATH=` + defaultPath + `"],"Volumes":{"/a":{},"/b":{},"/c":{}},"WorkingDir":"/","StopSignal":"SIGQUIT"`},
		{"labels", "FROM scratch\nARG V=1\nLABEL a=$V \"b c\"=\"d e\"\nLABEL a=2", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Labels":{"a":"2","b c":"d e"}`},
		{"healthcheck", "FROM scratch\nHEALTHCHECK --interval=5s --retries=2 CMD [\"/x\"]", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Healthcheck":{"Test":["CMD","/x"],"Interval":5000000000,"Retries":2}`},
		{"healthcheck none", "FROM scratch\nHEALTHCHECK NONE", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Healthcheck":{"Test":["NONE"]}`},
		{"onbuild", "FROM scratch\nONBUILD COPY a /b", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","OnBuild":["COPY a /b"]`},
		{"workdir", "FROM base\nWORKDIR rel", `"User":"7","ExposedPorts":{"1/tcp":{}},"Env":["PATH=/p","BASE=1"],"Entrypoint":["/base"],"Cmd":["x"],"WorkingDir":"/base/rel","Labels":{"l":"base"}`},
		{"global arg", "ARG TAG=base\nFROM ${TAG}\nARG TAG\nLABEL t=$TAG", `"User":"7","ExposedPorts":{"1/tcp":{}},"Env":["PATH=/p","BASE=1"],"Entrypoint":["/base"],"Cmd":["x"],"WorkingDir":"/base","Labels":{"l":"base","t":"base"}`},
		{"global arg not in scope", "ARG V=1\nFROM scratch\nLABEL v=x$V", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Labels":{"v":"x"}`},
		{"given arg", "FROM scratch\nARG GIVEN=no\nARG UNSET\nLABEL v=$GIVEN-$UNSET", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Labels":{"v":"yes-"}`},
		{"arg over env", "FROM scratch\nENV GIVEN=env\nARG GIVEN\nLABEL v=$GIVEN", `"Env":["PATH=` + defaultPath + `","GIVEN=env"],"WorkingDir":"/","Labels":{"v":"yes"}`},
		{"env over arg", "FROM scratch\nARG GIVEN\nENV GIVEN=env-$GIVEN\nLABEL v=$GIVEN", `"Env":["PATH=` + defaultPath + `","GIVEN=env-yes"],"WorkingDir":"/","Labels":{"v":"env-yes"}`},
		{"arg without value leaves env", "FROM scratch\nENV A=env\nARG A\nLABEL v=$A", `"Env":["PATH=` + defaultPath + `","A=env"],"WorkingDir":"/","Labels":{"v":"env"}`},
		{"arg of the stage below", "FROM scratch AS a\nARG L=1\nFROM a\nLABEL v=$L", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Labels":{"v":"1"}`},
		{"ports of run", "FROM scratch\nEXPOSE 8080:80 127.0.0.1:9090:90/udp 1-2:3-4 :7 [::1]:5:6", `"ExposedPorts":{"3/tcp":{},"4/tcp":{},"6/tcp":{},"7/tcp":{},"80/tcp":{},"90/udp":{}},"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/"`},
		{"working folder of an image that names none", "FROM bare", `"Env":["PATH=/p"]`},
		{"platform args", "FROM --platform=$BUILDPLATFORM scratch\nARG TARGETOS\nARG TARGETSTAGE\nLABEL v=$TARGETOS-$TARGETSTAGE", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Labels":{"v":"linux-default"}`},
		{"escape", "# escape=`\nFROM scratch\nLABEL a=1 `\n  b=2", `"Env":["PATH=` + defaultPath + `"],"WorkingDir":"/","Labels":{"a":"1","b":"2"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			e.t = t
			img := e.must(c.file+"\n", func(r *Request) { r.BuildArgs = map[string]*string{"GIVEN": ptr("yes"), "UNSET": nil} })
			got, err := json.Marshal(img.Config.Config)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != "{"+c.want+"}" {
				t.Errorf("config\n %s, want\n {%s}", got, c.want)
			}
		})
	}
}

func TestHistory(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	e.write("d/", "")
	img := e.must("FROM scratch\nARG V=1\nENV A=b\nCOPY --chown=1:2 a a /x/\nWORKDIR /x\nLABEL k=v w=\"x y\"\nEXPOSE 80\nUSER u\nVOLUME /v\nSTOPSIGNAL 9\nSHELL [\"s\",\"-c\"]\nMAINTAINER me\nADD <<f /f\nF\nf\nENTRYPOINT e\nCMD [\"x\"]\n",
		func(r *Request) { r.Labels = map[string]string{"flag": "1"} })
	want := []string{
		"ARG V=1|empty", "ENV A=b|empty", "COPY --chown=1:2 a a /x/|layer", "WORKDIR /x|empty", "LABEL k=v w=x y|empty", "EXPOSE [80/tcp]|empty",
		"USER u|empty", "VOLUME [/v]|empty", "STOPSIGNAL 9|empty", "SHELL [s -c]|empty", "MAINTAINER me|empty", "ADD <<f /f|layer",
		`ENTRYPOINT ["s" "-c" "e"]|empty`, `CMD ["x"]|empty`,
	}
	var got []string
	layers := 0
	for _, h := range img.Config.History {
		kind := "layer"
		if h.EmptyLayer {
			kind = "empty"
		} else {
			layers++
		}
		got = append(got, h.CreatedBy+"|"+kind)
		if h.Created == nil || h.Created.IsZero() || time.Since(*h.Created) > time.Hour {
			t.Errorf("%s: created %v", h.CreatedBy, h.Created)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("history\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if layers != len(img.Layers()) {
		t.Errorf("%d layers in the history, %d in the image", layers, len(img.Layers()))
	}
	if img.Config.Author != "me" || img.Config.OS != "linux" || img.Config.RootFS.Type != "layers" || img.Config.Config.Labels["flag"] != "1" {
		t.Errorf("config %s", img.RawConfig)
	}
}

// Triggers run in the child, before its own steps, and are gone then.
func TestOnBuild(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	e.write("b", "B")
	e.must("FROM scratch\nONBUILD COPY a /from-trigger\nONBUILD ENV T=1\n", e.tag("parent"))
	img := e.must("FROM parent\nCOPY b /own\nLABEL t=$T\n")
	e.wantTree(img, map[string]string{"from-trigger": "644 0:0 A", "own": "644 0:0 B"})
	if len(img.Config.Config.OnBuild) > 0 || img.Config.Config.Labels["t"] != "1" {
		t.Errorf("config %s", img.RawConfig)
	}
	if got := e.ended(Done); !slices.Equal(got, []string{"COPY b /own", "ONBUILD COPY a /from-trigger"}) {
		t.Errorf("ran %q", got)
	}
}

func TestRefusals(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	for _, c := range []struct {
		file, err string
		line      int
	}{
		{"", "file is empty", 1},
		{"FORM scratch\n", "unknown instruction: FORM (did you mean FROM?)", 1},
		{"FROM scratch\nCOPPY a b\n", "dockerfile parse error on line 2: unknown instruction: COPPY (did you mean COPY?)", 2},
		{"ENV A=b\nFROM scratch\n", "no build stage in current context", 1},
		{"FROM scratch\nCOPY a\n", "COPY requires at least two arguments", 2},
		{"ARG X\nFROM ${X}\n", "should not be blank", 2},
		{"FROM --platform=windows/amd64 scratch\n", "platform \"windows/amd64\"", 1},
		{"FROM scratch\nSTOPSIGNAL SIGNOPE\n", "invalid signal: SIGNOPE", 2},
		{"FROM scratch\nEXPOSE 99999\n", "invalid containerPort: 99999", 2},
		{"FROM scratch\nRUN --security=insecure x\n", "security.insecure is not allowed", 2},
		{"FROM scratch\nRUN --network=host x\n", "network.host is not allowed", 2},
		{"FROM scratch\nRUN --mount=type=secret,id=x,required x\n", "secret x: not found", 2},
		{"FROM nothere\n", "no such image", 1},
		{"FROM scratch\nCOPY --from=nothere /a /\n", "no such image", 2},
		{"FROM scratch AS x\nCOPY --from=x /a /\n", "can't copy from itself", 2},
		{"FROM scratch\nENV A=${\n", "", 2},
	} {
		_, err := e.build(c.file)
		var pe *dockerfile.ParseError
		var se *StepError
		line := 0
		switch {
		case errors.As(err, &pe):
			line = pe.Lines.First
		case errors.As(err, &se):
			line = se.Line
		}
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(c.err)) || line != c.line {
			t.Errorf("%q: line %d, want %d: %v", c.file, line, c.line, err)
		}
	}
	if _, err := e.build("FROM scratch\n", func(r *Request) { r.Target = "x" }); !errors.Is(err, ErrNoTarget) {
		t.Errorf("unknown target: %v", err)
	}
	if _, err := e.build("FROM scratch\n", func(r *Request) { r.Dockerfile = "none" }); !errors.Is(err, ErrNoDockerfile) {
		t.Errorf("no Dockerfile: %v", err)
	}
	if _, err := e.build("FROM scratch\n", e.tag("UPPER")); !errors.Is(err, image.ErrReference) {
		t.Errorf("bad tag: %v", err)
	}
}

func TestTags(t *testing.T) {
	e := newEnv(t)
	e.write("a", "A")
	img := e.must("FROM scratch\nCOPY a /\n", e.tag("one", "two:x"))
	if want := fmt.Sprint([]string{"one:latest", "two:x"}); fmt.Sprint(img.RepoTags) != want {
		t.Errorf("tags %v, want %s", img.RepoTags, want)
	}
	e.write("a", "B")
	other := e.must("FROM scratch\nCOPY a /\n", e.tag("one"))
	old, err := e.images.Get(img.ID)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(old.RepoTags) != "[two:x]" || fmt.Sprint(other.RepoTags) != "[one:latest]" {
		t.Errorf("old %v, new %v", old.RepoTags, other.RepoTags)
	}
}

// A --build-arg that nothing takes is worth a remark.
func TestUnconsumedArgs(t *testing.T) {
	e := newEnv(t)
	e.must("ARG G\nFROM scratch AS other\nARG O\nFROM scratch\nONBUILD ARG B\nENV A=1\n", func(r *Request) {
		r.BuildArgs = map[string]*string{"G": ptr("1"), "O": ptr("1"), "TYPO": ptr("1"), "B": nil, "HTTP_PROXY": ptr("x"), "TARGETARCH": ptr("y"), "BUILDKIT_INLINE_CACHE": ptr("1")}
	})
	var got []string
	for _, ev := range e.events {
		if ev.Kind == Warning {
			got = append(got, ev.Text)
		}
	}
	if len(got) != 1 || got[0] != "build arguments that no ARG of the Dockerfile takes: B, TYPO" {
		t.Errorf("warnings %q", got)
	}
}
