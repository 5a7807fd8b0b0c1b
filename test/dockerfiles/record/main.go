// Command record builds the cases of test/dockerfiles with a BuildKit and writes what it made of them to want/*.txt: the only source of
// what TestDockerfiles expects. Cases whose input is the recorded one are left alone.
//
//	go run ./test/dockerfiles/record -addr unix:///run/buildkit/buildkitd.sock [-buildctl PATH] [-all] [-run REGEXP]
//
// The daemon needs runc, the host's network (networkMode = "host"), the entitlements network.host and security.insecure, and the images
// of images/make as its docker.io: `go run ./images/serve`, and in buildkitd.toml
//
//	[registry."docker.io"]
//	  mirrors = ["127.0.0.1:5000"]
//	[registry."127.0.0.1:5000"]
//	  http = true
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"conex/test/casefile"
	"conex/test/dockerfiles"
)

type recorder struct {
	buildctl, addr, version string
	base                    *dockerfiles.Image
}

func main() {
	var r recorder
	dir := flag.String("dir", "test/dockerfiles", "the folder of cases/ and want/")
	flag.StringVar(&r.addr, "addr", "unix:///run/buildkit/buildkitd.sock", "buildkitd's address")
	flag.StringVar(&r.buildctl, "buildctl", "buildctl", "the client")
	all := flag.Bool("all", false, "record cases again that are recorded")
	run := flag.String("run", ".", "record only cases whose name matches")
	flag.Parse()
	if err := r.record(*dir, *all, *run); err != nil {
		fmt.Fprintln(os.Stderr, "record:", err)
		os.Exit(1)
	}
}

func (r *recorder) record(dir string, all bool, run string) error {
	re, err := regexp.Compile(run)
	if err != nil {
		return err
	}
	cases, err := dockerfiles.Load(dir)
	if err != nil {
		return err
	}
	wants, err := casefile.LoadWants(dir)
	if err != nil {
		return err
	}
	h, err := dockerfiles.Handler(cases)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", dockerfiles.HTTPAddr)
	if err != nil {
		return err
	}
	go http.Serve(l, h) //nolint:errcheck // it ends with the program
	out, err := exec.Command(r.buildctl, "--addr", r.addr, "debug", "info").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	r.version = strings.Join(strings.Fields(string(out)), " ")
	begun := time.Now()
	if r.base, err = r.baseImage(); err != nil {
		return err
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	slots := make(chan struct{}, 3)
	count := 0
	for _, c := range cases {
		old := wants[c.Name]
		if !re.MatchString(c.Name) || !all && len(old) > 0 && old[0] == "input "+c.Input() {
			continue
		}
		count++
		wg.Add(1)
		slots <- struct{}{}
		go func() {
			defer wg.Done()
			defer func() { <-slots }()
			lines, err := r.build(c)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
				return
			}
			wants[c.Name] = append([]string{"input " + c.Input()}, lines...)
		}()
	}
	wg.Wait()
	fmt.Printf("%d cases, %d recorded in %.0f s\n", len(cases), count, time.Since(begun).Seconds())
	titles := make([]casefile.Title, len(cases))
	for i, c := range cases {
		titles[i] = c.Title
	}
	return wants.Save(dir, "Recorded by test/dockerfiles/record from BuildKit ("+r.version+"). Not to be edited.", titles)
}

func (r *recorder) baseImage() (*dockerfiles.Image, error) {
	dir, err := os.MkdirTemp("", "record.")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM busybox\n"), 0o644); err != nil {
		return nil, err
	}
	img, failure, err := r.solve(dir, dir, nil)
	if err == nil && failure != nil {
		err = errors.New(strings.Join(failure, "\n"))
	}
	return img, err
}

// build builds a case and describes what came of it. What three builds do not agree on is not recorded.
func (r *recorder) build(c *dockerfiles.Case) ([]string, error) {
	var lines []string
	for i := range 3 {
		got, err := r.once(c)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			lines = got
		}
		if lines, err = dockerfiles.Agree(lines, got); err != nil {
			return nil, err
		}
	}
	return lines, nil
}

func (r *recorder) once(c *dockerfiles.Case) ([]string, error) {
	dir, err := os.MkdirTemp("", "record.")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	// The daemon takes a file of an earlier build's context for the same if name, size and time are: no two builds have the same time. What
	// is less than a second does not reach the image.
	p, err := c.Write(dir, time.Duration(rand.Int64N(int64(time.Second))))
	if err != nil {
		return nil, err
	}
	img, failure, err := r.solve(dir, p.Context, c.BuildFlags(p))
	if err != nil || failure != nil {
		return failure, err
	}
	return c.Render(img, r.base)
}

func (r *recorder) solve(dir, context string, flags []string) (*dockerfiles.Image, []string, error) {
	dest := filepath.Join(dir, "image.tar")
	args := []string{"--addr", r.addr, "build", "--progress", "plain", "--no-cache", "--frontend", "dockerfile.v0", "--local", "context=" + context,
		"--local", "dockerfile=" + context, "--output", "type=oci,compression=uncompressed,dest=" + dest}
	opts, err := translate(flags)
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(r.buildctl, append(args, opts...)...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil, dockerfiles.Failure(string(out)), nil
	}
	if err != nil {
		return nil, nil, err
	}
	data, err := os.ReadFile(dest)
	if err != nil {
		return nil, nil, err
	}
	img, err := dockerfiles.ReadArchive(bytes.NewReader(data))
	return img, nil, err
}

// translate turns flags of `build` into buildctl's.
func translate(flags []string) ([]string, error) {
	var out []string
	opt := func(s string) { out = append(out, "--opt", s) }
	for i := 0; i < len(flags); i++ {
		name, value, ok := strings.Cut(flags[i], "=")
		if name == "--no-cache" || name == "--pull" {
			continue
		}
		if !ok {
			if i++; i == len(flags) {
				return nil, fmt.Errorf("%s has no value", name)
			}
			value = flags[i]
		}
		switch name {
		case "--build-arg":
			opt("build-arg:" + value)
		case "--label":
			opt("label:" + value)
		case "--target":
			opt("target=" + value)
		case "--platform":
			opt("platform=" + value)
		case "-f", "--file":
			opt("filename=" + value)
		case "--network":
			opt("force-network-mode=" + value)
		case "--add-host":
			opt("add-hosts=" + strings.Replace(value, ":", "=", 1))
		case "--shm-size":
			opt("shm-size=" + value)
		case "--ulimit":
			opt("ulimit=" + value)
		case "--allow":
			out = append(out, "--allow", value)
		case "--secret":
			out = append(out, "--secret", value)
		case "--build-context":
			n, where, _ := strings.Cut(value, "=")
			if strings.Contains(where, "://") {
				opt("context:" + n + "=" + where)
				break
			}
			opt("context:" + n + "=local:" + n)
			out = append(out, "--local", n+"="+where)
		default:
			return nil, fmt.Errorf("flag %s: not known to the recorder", name)
		}
	}
	return out, nil
}
