package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Tests of the command: its start, its flags, and starts that must fail.

// startCommand runs the command in this process. The returned stop ends it, and
// returns all that it has printed.
func startCommand(t *testing.T, flags ...string) (c *client, stop func() (output string)) {
	ctx, cancel := context.WithCancel(t.Context())
	r, stderr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer stderr.Close()
		if err := run(ctx, append(flags, "-addr", "localhost:0"), stderr); err != nil {
			t.Error(err)
		}
	}()
	lines, output := bufio.NewReader(r), ""
	stop = func() string {
		cancel()
		rest, _ := io.ReadAll(lines) // all of it has been read if stop is called twice
		output += string(rest)
		return output
	}
	t.Cleanup(func() { stop() })
	for {
		line, err := lines.ReadString('\n')
		output += line
		if url := regexp.MustCompile(`at (http:.*)`).FindStringSubmatch(line); url != nil {
			return &client{t, url[1], http.DefaultTransport, "*", make(map[string]string)}, stop
		} else if err != nil {
			t.Fatalf("it does not start:\n%s", output)
		}
	}
}

// TestCommand starts the command twice; the second time, FILE ends with half a line.
func TestCommand(t *testing.T) {
	const welcome = "Idea Pool is at (http://127.0.0.1:\\d+)\n  data: ideapool.json\n  key:  ideapool.pem\nTry it:\n" +
		"  curl http://127.0.0.1:\\d+/users -d email=me@example.org -d name=Me -d password=the-Secret-123\n"
	t.Chdir(t.TempDir())
	c, stop := startCommand(t)
	c.signUp()
	for range 3 {
		c.expect("POST /ideas", anIdea, "201", withToken)
	}
	before := c.send("GET /ideas", "", withToken).body
	if output := stop(); !regexp.MustCompile("^" + welcome + "(time=.* msg=request .*\n){5}$").MatchString(output) {
		t.Errorf("got the output\n%s\nwant\n%s and five lines of the log", output, welcome)
	}
	saved := filesIn(t, ".")
	for _, secret := range []string{"the-Secret", c.names["jwt"], c.names["refresh"]} {
		if strings.Contains(saved, secret) {
			t.Errorf("%s is in the files\n%s", secret, saved)
		}
	}
	writeFile(t, "ideapool.json", readFile(t, "ideapool.json")+"{")
	names := c.names
	c, stop = startCommand(t, "-quiet")
	c.names = names
	if after := c.send("GET /ideas", "", withToken).body; after != before || strings.Count(after, "created_at") != 3 {
		t.Errorf("after a restart, got the list\n%s\nwant\n%s", after, before)
	}
	c.expect("POST /access-tokens/refresh", `{"refresh_token":"$refresh"}`, "200")
	c.expect("POST /access-tokens", jacksLogin, "201")
	for range 11 {
		c.send("POST /access-tokens", `{"email":"jack@test.com","password":"wrong"}`)
	}
	const failures = "(time=.* status=400 .*\n){10}time=.* status=429 .*\n"
	if output := stop(); !regexp.MustCompile("^time=.* line=8\n" + welcome + failures + "$").MatchString(output) {
		t.Errorf("with -quiet, got the output\n%s\nwant a warning about line 8,\n%s%s", output, welcome, failures)
	}
}

// TestOrigins tests that -cors-origin takes what browsers send, and nothing else.
func TestOrigins(t *testing.T) {
	accepted := func(origin string) bool {
		_, err := parseFlags([]string{"-cors-origin", origin}, io.Discard)
		return err == nil
	}
	for origin := range strings.FieldsSeq(`
		* none https://a.example https://a.example:8443 https://a.example:80 http://a.example:443
		http://localhost:3000 http://a:1 capacitor://localhost chrome-extension://abcdef http://192.168.0.1
		http://[::1]:8080 https://xn--bcher-kva.example http://a_b.example https://1a.example`) {
		if !accepted(origin) {
			t.Errorf("%s is rejected", origin)
		}
	}
	for _, origin := range append(strings.Fields(`
		null None ** a.example //a.example https:a.example https:// https://a.example/ https://a.example/b
		https://a.example?b https://a.example# https://a.example,https://b.example https://*.example
		https://A.example HTTPS://a.example https://bücher.example https://user@a.example https://a.example:
		https://a.example:443 http://a:80 http://a:0 http://a:65536 http://[:::] http://a:08080 http://a:-1 http://a:b
		http://[::1 http://[::1%eth0] http://[::FFFF] http://::1 file:// file://localhost`),
		"", " https://a.example", "https://a.example\n") {
		if accepted(origin) {
			t.Errorf("%q is accepted", origin)
		}
	}
}

// TestBadStarts tests that an error at the start is one line that names the flag
// or the file, and that no file is changed or left behind.
func TestBadStarts(t *testing.T) {
	busy := httptest.NewServer(nil)
	defer busy.Close()
	busyAddr := busy.Listener.Addr().String()
	key, err := filepath.Abs(rfcKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	t.Chdir(directory)
	os.MkdirAll("blocked.tmp/x", 0o700) // so that blocked cannot be written
	writeFile(t, "garbage", "garbage")
	if exec.Command("mkfifo", "fifo").Run() != nil { // there are none on Windows
		os.Mkdir("fifo", 0o700)
	}
	for link, target := range map[string]string{"link": "garbage", "here": ".", "null": os.DevNull, "dangling": "x"} {
		if symlink(target, link) != nil {
			t.Skip("this system has no symbolic links")
		}
	}
	startStore(t, "held", noSync)
	for _, name := range []string{"garbage", "blocked", "ideas"} {
		writeFile(t, name+".lock", "") // which a start may make
	}
	before := filesIn(t, ".")
	stopped, stop := context.WithCancel(t.Context()) // if it starts, it stops at once
	stop()
	const (
		usage     = "invalid usage: "
		badOrigin = usage + `-cors-origin ".*" is not an origin as browsers send it; ` +
			`give '[*]', none, or one such as https://example.org`
		badTime  = usage + "-access-ttl and -refresh-ttl must be 1s or more"
		sameFile = usage + "-key is one of the files that -data uses; choose another name"
	)
	for _, test := range []struct{ args, want string }{
		{"-nope", usage + "flag provided but not defined: -nope"},
		{"serve", usage + `unexpected argument "serve"`},
		{"-access-ttl 999ms", badTime},
		{"-refresh-ttl -1h", badTime},
		{"-cors-origin example.org", badOrigin},
		{"-addr=", usage + `-addr "" must have a port, such as localhost:8080`},
		{"-addr localhost:", usage + `-addr "localhost:" must have a port, such as localhost:8080`},
		{"-key=", usage + "-key is empty; give the name of a file"},
		{"-data store/", usage + "-data and -key must name files, not directories"},
		{"-key keys/", usage + "-data and -key must name files, not directories"},
		{"-key " + filepath.Join(directory, "ideas") + " -data ideas", sameFile},
		{"-key ./ideas.tmp -data ideas", sameFile},
		{"-key ideas.lock -data here/ideas", sameFile},
		{"-key link -data garbage", sameFile},

		{"-addr " + busyAddr + " -data ideas", "-addr " + busyAddr + ": listen tcp .*: bind: .*"},
		{"-key garbage", "-key garbage: not a PEM file.*"},
		{"-key blocked.tmp", "-key blocked.tmp: not a regular file.*"},
		{"-key fifo", "-key fifo: not a regular file.*"},
		{"-key null", "-key null: not a regular file.*"},
		{"-key link", "-key link: not a PEM file.*"},
		{"-key dangling", "-key dangling: .*"},
		{"-key missing/key.pem -data ideas", "-key missing/key.pem: .*"},
		{"-data garbage", "-data garbage: line 1: .*"},
		{"-data blocked.tmp", "-data blocked.tmp: not a regular file.*"},
		{"-data fifo", "-data fifo: not a regular file.*"},
		{"-data null", "-data null: not a regular file.*"},
		{"-data held", "-data held: in use by another process; stop that process first"},
		{"-data dangling", "-data dangling: .*"},
		{"-data missing/data", "-data missing/data: .*"},
		{"-data blocked", "-data blocked: .*blocked.tmp.*"},
	} {
		var stderr bytes.Buffer
		defaults := []string{"-addr", "localhost:0", "-data", "", "-key", key}
		err := run(stopped, append(defaults, strings.Fields(test.args)...), &stderr)
		want, isUsage := "^"+test.want+"$", strings.HasPrefix(test.want, usage)
		if isUsage {
			want = "^" + test.want + ` \(run ideapool -h for help\)$`
		}
		if !regexp.MustCompile(want).MatchString(fmt.Sprint(err)) || errors.Is(err, errUsage) != isUsage || stderr.Len() > 0 {
			t.Errorf("%s: got the error %v and the output %q, want %s", test.args, err, &stderr, want)
		}
		if after := filesIn(t, "."); after != before {
			t.Fatalf("%s: got the files\n%s\nwant\n%s", test.args, after, before)
		}
	}
}

// TestFlagsAndOutput tests defaults, help, exit status, and what is printed at startup.
func TestFlagsAndOutput(t *testing.T) {
	o, err := parseFlags(nil, io.Discard)
	want := options{
		addr: "localhost:8080", data: "ideapool.json", key: "ideapool.pem",
		accessTTL: 10 * time.Minute, refreshTTL: 720 * time.Hour, corsOrigin: "*",
	}
	if err != nil || o != want {
		t.Errorf("without flags: got %+v, want %+v", o, want)
	}
	for argument, want := range map[string]struct {
		status int
		stderr string
	}{
		"-h": {0, `(?s)^Usage: ideapool \[flags\]\n  -access-ttl .*-addr .*-cors-origin .*-data .*-key .*-quiet.*` +
			`-refresh-ttl .*-trust-proxy[^\n]*\n[^\n]*\n$`},
		"-nope":        {2, "^ideapool: invalid usage: flag provided but not defined: -nope .run ideapool -h for help.\n$"},
		"-addr=x:port": {1, "^ideapool: -addr x:port: .*\n$"},
	} {
		var stderr bytes.Buffer
		command := exec.Command(os.Args[0], argument)
		command.Env, command.Stderr = append(os.Environ(), serveEnv+"=1"), &stderr
		command.Run()
		got := command.ProcessState.ExitCode()
		if got != want.status || !regexp.MustCompile(want.stderr).MatchString(stderr.String()) {
			t.Errorf("%s: got status %d and\n%s\nwant %d and %s", argument, got, &stderr, want.status, want.stderr)
		}
	}
}
