package engine

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conex/internal/ocispec"

	apic "github.com/moby/moby/api/types/container"
	mnet "github.com/moby/moby/api/types/network"
)

// TestCommand has Docker's table of entrypoint and command, of image and user.
func TestCommand(t *testing.T) {
	for _, c := range []struct {
		name             string
		imgEntry, imgCmd []string
		entry, cmd       []string
		want             string
	}{
		{"image's command", nil, []string{"sh"}, nil, nil, "sh"},
		{"user's command", nil, []string{"sh"}, nil, []string{"ls", "-l"}, "ls -l"},
		{"image's both", []string{"e"}, []string{"c"}, nil, nil, "e c"},
		{"user's command behind the image's entrypoint", []string{"e"}, []string{"c"}, nil, []string{"x"}, "e x"},
		{"user's entrypoint drops the image's command", []string{"e"}, []string{"c"}, []string{"u"}, nil, "u"},
		{"user's both", []string{"e"}, []string{"c"}, []string{"u"}, []string{"x"}, "u x"},
		{"entrypoint taken away", []string{"e"}, []string{"c"}, []string{""}, []string{"x"}, "x"},
	} {
		conf := &apic.Config{Entrypoint: c.entry, Cmd: c.cmd}
		var img ocispec.ImageConfig
		img.Entrypoint, img.Cmd = c.imgEntry, c.imgCmd
		mergeImage(conf, img)
		path, args, err := command(conf)
		if got := strings.Join(append([]string{path}, args...), " "); err != nil || got != c.want {
			t.Errorf("%s: %q %v", c.name, got, err)
		}
	}
	if _, _, err := command(&apic.Config{}); !errors.Is(err, ErrInvalid) || err.Error() != "no command specified" {
		t.Errorf("%v", err)
	}
}

func TestMergeImage(t *testing.T) {
	labels := map[string]string{"a": "user"}
	conf := &apic.Config{Env: []string{"A=user", "B=user"}, Labels: labels, ExposedPorts: mnet.PortSet{mnet.MustParsePort("80"): {}}}
	var img ocispec.ImageConfig
	img.Env, img.User, img.WorkingDir, img.StopSignal = []string{"PATH=/bin", "A=image"}, "bob", "/w", "SIGINT"
	img.Labels = map[string]string{"a": "image", "b": "image"}
	img.ExposedPorts = map[string]struct{}{"443/tcp": {}, "bad": {}}
	mergeImage(conf, img)
	if !slices.Equal(conf.Env, []string{"PATH=/bin", "A=user", "B=user"}) || conf.User != "bob" || conf.WorkingDir != "/w" || conf.StopSignal != "SIGINT" {
		t.Errorf("%+v", conf)
	}
	if conf.Labels["a"] != "user" || conf.Labels["b"] != "image" || len(conf.ExposedPorts) != 2 {
		t.Errorf("%v %v", conf.Labels, conf.ExposedPorts)
	}
	if len(labels) != 1 {
		t.Errorf("the caller's labels were changed: %v", labels)
	}
}

// TestValidate has requests that must be refused, each with one clear error, before anything is made.
func TestValidate(t *testing.T) {
	e := newImageEngine(t)
	for want, hc := range map[string]apic.HostConfig{
		"Minimum memory limit allowed is 6MB":                     {Resources: apic.Resources{Memory: 1 << 20}},
		"range of CPUs is from 0.01":                              {Resources: apic.Resources{NanoCPUs: 1e15}},
		"unknown policy 'sometimes'":                              {RestartPolicy: apic.RestartPolicy{Name: "sometimes"}},
		"maximum retry count can only be used with 'on-failure'":  {RestartPolicy: apic.RestartPolicy{Name: "always", MaximumRetryCount: 1}},
		"can't create 'AutoRemove' container with restart policy": {AutoRemove: true, RestartPolicy: apic.RestartPolicy{Name: "always"}},
		`invalid CapAdd: unknown capability: "CAP_NONSENSE"`:      {CapAdd: []string{"nonsense"}},
		`invalid --security-opt: "what=ever"`:                     {SecurityOpt: []string{"what=ever"}},
		"opening seccomp profile (/nosuch) failed":                {SecurityOpt: []string{"seccomp=/nosuch"}},
		"bad format for add-host":                                 {ExtraHosts: []string{"nonsense"}},
		"invalid hostPort: 90000":                                 {PortBindings: mnet.PortMap{mnet.MustParsePort("1"): {{HostPort: "90000"}}}},
		"invalid hostPort: 20-10":                                 {PortBindings: mnet.PortMap{mnet.MustParsePort("1"): {{HostPort: "20-10"}}}},
		"No such container: x":                                    {PidMode: "container:x"},
		"No such container: y":                                    {IpcMode: "container:y"},
		"No such container: z":                                    {NetworkMode: "container:z"},
		"invalid PID mode: x":                                     {PidMode: "x"},
		"invalid IPC mode: x":                                     {IpcMode: "x"},
		"invalid UTS mode: x":                                     {UTSMode: "x"},
		"invalid cgroup namespace mode: x":                        {CgroupnsMode: "x"},
		"port publishing and the container type network mode":     {NetworkMode: "container:z", PublishAllPorts: true},
		"sysctl 'kernel.core_pattern' is not allowed":             {Sysctls: map[string]string{"kernel.core_pattern": "|/x"}},
		"sysctl 'net.../x' is not allowed":                        {Sysctls: map[string]string{"net.../x": "1"}},
		`"net.core.somaxconn" not allowed in host network`:        {NetworkMode: "host", Sysctls: map[string]string{"net.core.somaxconn": "1"}},
		"linux only supports 'default'":                           {Isolation: "hyperv"},
		"not permitted as an annotation key":                      {Annotations: map[string]string{"": "x"}},
		"network nosuch not found":                                {NetworkMode: "nosuch"},
		"always set the Memory limit when using Memoryswap":       {Resources: apic.Resources{MemorySwap: 1 << 30}},
		"Invalid value 2000, range for oom score adj is":          {OomScoreAdj: 2000},
	} {
		conf := apic.Config{Image: "x"}
		_, err := e.validate(t.Context(), &conf, &hc)
		if err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrNotFound) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	for want, conf := range map[string]apic.Config{
		"needs to be an absolute path":    {WorkingDir: "x"},
		"invalid signal: NOPE":            {StopSignal: "NOPE"},
		"invalid environment variable: =": {Env: []string{"=x"}},
		"invalid hostname":                {Hostname: "a b"},
	} {
		if _, err := e.validate(t.Context(), &conf, &apic.HostConfig{}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	hc := apic.HostConfig{NetworkMode: "host", PublishAllPorts: true}
	if w, err := e.validate(t.Context(), &apic.Config{}, &hc); err != nil || len(w) != 1 || w[0] != "Published ports are discarded when using host network mode" {
		t.Errorf("%q %v", w, err)
	}
	hc = apic.HostConfig{}
	if _, err := e.validate(t.Context(), &apic.Config{}, &hc); err != nil || hc.NetworkMode != "bridge" {
		t.Errorf("%q %v", hc.NetworkMode, err)
	}
}

// TestSeccompFileIsKept has a profile's content in the record, since the file may go.
func TestSeccompFileIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.json")
	if err := os.WriteFile(path, []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	hc := apic.HostConfig{SecurityOpt: []string{"seccomp=" + path}}
	if err := validateSecurity(t.Context(), nil, &hc); err != nil || hc.SecurityOpt[0] != `seccomp={"defaultAction":"SCMP_ACT_ALLOW"}` {
		t.Errorf("%q %v", hc.SecurityOpt, err)
	}
}

func TestCheckTmpfs(t *testing.T) {
	for in, ok := range map[string]bool{"": true, "size=64m,mode=1777,noexec": true, "rw,exec": true, "size": false, "lowerdir=/": false, "exec=1": false, "bind": false} {
		if err := checkTmpfs(in); (err == nil) != ok {
			t.Errorf("%q: %v", in, err)
		}
	}
}
