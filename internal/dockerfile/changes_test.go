package dockerfile

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"conex/internal/ocispec"
)

func TestApplyChanges(t *testing.T) {
	var c ocispec.ImageConfig
	c.Env = []string{"PATH=/bin", "A=old"}
	c.Cmd = []string{"gone"}
	c.WorkingDir = "/srv"
	base := c
	err := ApplyChanges(&c, []string{
		`ENTRYPOINT ["/bin/app", "-x"]`, `ENV A="b c" D=$PATH:/x`, `ENV E one two`, `EXPOSE 80 8000-8002/udp`, `LABEL a.b=c "d e"="f g"`,
		`USER 1000:$PATH`, `VOLUME ["/data", "/log"]`, `WORKDIR sub/../app`, `STOPSIGNAL SIGQUIT`, `ONBUILD RUN make`,
		`HEALTHCHECK --interval=5s CMD curl -f localhost`,
	})
	if err != nil {
		t.Fatal(err)
	}
	var want ocispec.ImageConfig
	want.Env = []string{"PATH=/bin", "A=b c", "D=/bin:/x", "E=one two"}
	want.Entrypoint = []string{"/bin/app", "-x"}
	want.ExposedPorts = map[string]struct{}{"80/tcp": {}, "8000/udp": {}, "8001/udp": {}, "8002/udp": {}}
	want.Labels = map[string]string{"a.b": "c", "d e": "f g"}
	want.User = "1000:/bin"
	want.Volumes = map[string]struct{}{"/data": {}, "/log": {}}
	want.WorkingDir = "/srv/app"
	want.StopSignal = "SIGQUIT"
	want.OnBuild = []string{"RUN make"}
	want.Healthcheck = &ocispec.Healthcheck{Test: []string{"CMD-SHELL", "curl -f localhost"}, Interval: 5 * time.Second}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	if !reflect.DeepEqual(base.Env, []string{"PATH=/bin", "A=old"}) {
		t.Errorf("the old config's list was written to: %v", base.Env)
	}
	if err := ApplyChanges(&c, []string{"CMD echo $HOME", `ENTRYPOINT []`}); err != nil || !reflect.DeepEqual([]string(c.Cmd), []string{"/bin/sh", "-c", "echo $HOME"}) || len(c.Entrypoint) != 0 {
		t.Errorf("shell form: %v %v %v", c.Cmd, c.Entrypoint, err)
	}
}

func TestApplyChangesRefuses(t *testing.T) {
	for change, want := range map[string]string{
		"RUN rm -rf /":            "RUN is not a valid change command",
		"FROM x":                  "is not a valid change command",
		"COPY a b":                "COPY is not a valid change command",
		"NONSENSE":                "unknown instruction",
		"EXPOSE 70000":            "invalid containerPort",
		"EXPOSE 80/icmp":          "invalid proto",
		"ENV A":                   "ENV must have two arguments",
		"VOLUME [\"\"]":           "empty string",
		"STOPSIGNAL":              "exactly one argument",
		"EXPOSE 9-8":              "invalid containerPort",
		"LABEL a=\"b":             "",
		"# check=skip=all\nRUN x": "RUN is not a valid change command",
		"USER a\nRUN evil":        "RUN is not a valid change command",
	} {
		var c ocispec.ImageConfig
		err := ApplyChanges(&c, []string{"WORKDIR /x", change})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", change, err, want)
		}
		if c.WorkingDir != "" {
			t.Errorf("%q: half of it was applied", change)
		}
	}
}
