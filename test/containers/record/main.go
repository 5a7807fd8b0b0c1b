// Command record types the cases of test/containers to a Docker and writes what it answered to want/*.txt: the only source of what
// TestContainers expects. Cases whose input is the recorded one are left alone. It starts dockerd itself, each with its own folders and
// network namespace, and ends it again.
//
//	go run ./test/containers/record [-all] [-run REGEXP] [-daemons N]
//
// It wants root, dockerd and docker in PATH (Debian's docker.io), and Debian's busybox-static.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"conex/test/casefile"
	"conex/test/containers"
)

func main() {
	dir := flag.String("dir", "test/containers", "the folder of cases/ and want/")
	all := flag.Bool("all", false, "record cases again that are recorded")
	run := flag.String("run", ".", "record only cases whose name matches")
	daemons := flag.Int("daemons", 3, "daemons to record with at the same time")
	show := flag.Bool("show", false, "print the answers instead of keeping them")
	flag.Parse()
	if err := record(*dir, *all, *run, *daemons, *show); err != nil {
		fmt.Fprintln(os.Stderr, "record:", err)
		os.Exit(1)
	}
}

func record(dir string, all bool, run string, daemons int, show bool) error {
	re, err := regexp.Compile(run)
	if err != nil {
		return err
	}
	cases, err := containers.Load(dir)
	if err != nil {
		return err
	}
	wants, err := casefile.LoadWants(dir)
	if err != nil {
		return err
	}
	var todo []*containers.Case
	for _, c := range cases {
		if old := wants[c.Name]; re.MatchString(c.Name) && (all || show || len(old) == 0 || old[0] != "input "+c.Input()) {
			todo = append(todo, c)
		}
	}
	base, err := os.MkdirTemp("/var/tmp", "record.")
	if err != nil {
		return err
	}
	defer os.RemoveAll(base)
	probe, rootfs := filepath.Join(base, "probe"), filepath.Join(base, "rootfs.tar")
	build := exec.Command("go", "build", "-o", probe, "conex/test/containers/probe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	f, err := os.Create(rootfs)
	if err != nil {
		return err
	}
	if err := containers.WriteRootfs(f); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	begun := time.Now()
	queue := make(chan *containers.Case)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	var version string
	for i := range min(daemons, len(todo)) {
		d, err := start(filepath.Join(base, fmt.Sprint("d", i)), rootfs, probe)
		if err != nil {
			errs = append(errs, err)
			break
		}
		defer d.end()
		version = d.version
		wg.Add(1)
		go func() {
			defer wg.Done()
			for c := range queue {
				lines, err := d.answers(c)
				mu.Lock()
				if err != nil {
					fmt.Fprintf(os.Stderr, "%s: %v\n", c.Name, err)
				} else if show {
					fmt.Printf("== %s\n%s\n", c.Name, strings.Join(lines, "\n"))
				} else {
					wants[c.Name] = lines
				}
				mu.Unlock()
			}
		}()
	}
	if len(errs) == 0 {
		for _, c := range todo {
			queue <- c
		}
	}
	close(queue)
	wg.Wait()
	if err := errors.Join(errs...); err != nil || len(todo) == 0 || show {
		return err
	}
	fmt.Printf("%d cases, %d recorded in %.0f s\n", len(cases), len(todo), time.Since(begun).Seconds())
	titles := make([]casefile.Title, len(cases))
	for i, c := range cases {
		titles[i] = c.Title
	}
	return wants.Save(dir, "Recorded by test/containers/record from Docker ("+version+"). Not to be edited.", titles)
}

// daemon is a dockerd with folders and a network namespace of its own.
type daemon struct {
	dir, version string
	cmd          *exec.Cmd
	place        containers.Place
}

func start(dir, rootfs, probe string) (_ *daemon, err error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d := &daemon{dir: dir}
	if err := writeRunc(filepath.Join(dir, "bin")); err != nil {
		return nil, err
	}
	sock := "unix://" + filepath.Join(dir, "sock")
	d.cmd = exec.Command("unshare", "--net", "sh", "-c", `ip link set lo up; PATH=$0:$PATH; exec dockerd "$@"`, filepath.Join(dir, "bin"), "--data-root", dir+"/data", "--exec-root", dir+"/exec", "-H", sock, "--pidfile", dir+"/pid")
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := d.cmd.Start(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.end()
		}
	}()
	d.place = containers.Place{
		Env:   append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "DOCKER_") }), "DOCKER_HOST="+sock),
		Probe: probe,
		Start: func(cmd *exec.Cmd) error {
			cmd.Path, err = exec.LookPath("nsenter")
			cmd.Args = append([]string{"nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", d.cmd.Process.Pid)}, cmd.Args...)
			return errors.Join(err, cmd.Start())
		},
	}
	out, err := d.sh("eventually docker info; docker version -f '{{.Client.Version}} and daemon {{.Server.Version}}'\n" + containers.Import(rootfs))
	d.version, _, _ = strings.Cut(out, "\n")
	d.version = "client " + d.version
	return d, err
}

// writeRunc writes a runc that asks for no capability that this process has not: where one is missing, as in many virtual machines,
// Docker's --privileged fails otherwise.
func writeRunc(dir string) error {
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, caps, _ := strings.Cut(string(status), "CapBnd:\t")
	have, err := strconv.ParseUint(caps[:16], 16, 64)
	if err != nil {
		return err
	}
	script := "#!/bin/sh\nfor a; do case $p in --bundle) f=$a/config.json ;; --process) f=$a ;; esac; p=$a; done\n"
	if have>>unix.CAP_SYS_RESOURCE&1 == 0 {
		script += `[ -z "$f" ] || sed -i 's/"CAP_SYS_RESOURCE",//g; s/,"CAP_SYS_RESOURCE"//g' "$f"` + "\n"
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "runc"), []byte(script+"exec "+runc+` "$@"`+"\n"), 0o755)
}

func (d *daemon) sh(line string) (string, error) {
	cmd := exec.Command("sh", "-c", `eventually() { n=0; until "$@" >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 150 ] || return 1; sleep 0.2; done; }; `+line)
	cmd.Env = d.place.Env
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := d.place.Start(cmd); err != nil {
		return "", err
	}
	if err := cmd.Wait(); err != nil {
		return "", fmt.Errorf("%w: %s", err, errs.String())
	}
	return out.String(), nil
}

func (d *daemon) end() {
	d.cmd.Process.Signal(syscall.SIGTERM)                                                                                                                         //nolint:errcheck // it has ended
	d.cmd.Wait()                                                                                                                                                  //nolint:errcheck // how it ends is its business
	exec.Command("sh", "-c", `awk -v d="$1/" 'index($5, d) == 1 {print $5}' /proc/self/mountinfo | sort -r | xargs -r umount -l; rm -rf "$1"`, "sh", d.dir).Run() //nolint:errcheck // what stays is seen
}

// answers are what two runs agree on.
func (d *daemon) answers(c *containers.Case) ([]string, error) {
	var first []string
	for range 2 {
		dir, err := os.MkdirTemp("/var/tmp", "case.")
		if err != nil {
			return nil, err
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil {
			return nil, err
		}
		answers, err := d.place.Run(context.Background(), c, dir)
		err = errors.Join(err, d.place.Clean(context.Background()))
		if err != nil {
			return nil, err
		}
		lines := c.Format(answers)
		if first == nil {
			first = lines
		} else if !slices.Equal(first, lines) {
			return nil, fmt.Errorf("two runs don't agree:\n%s\n---\n%s", strings.Join(first, "\n"), strings.Join(lines, "\n"))
		}
	}
	return first, nil
}
