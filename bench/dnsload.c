/* An upstream and a client that are faster than what is measured between them.
 *
 * dnsload serve PORT                        answers every A query with one address made from the name, TTL 300
 * dnsload load PORT WINDOW COUNT NAMES SALT asks for nN.SALT.example.org, N counting up modulo NAMES, WINDOW at once;
 *                                           prints: p50 and p99 in microseconds, queries a second, answers without address
 */
#include <arpa/inet.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int udp(int port, int listening)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int sock = socket(AF_INET, SOCK_DGRAM, 0), size = 4 << 20;
    setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (listening ? bind(sock, (void *)&at, sizeof at) : connect(sock, (void *)&at, sizeof at)) {
        perror("dnsload");
        exit(1);
    }
    return sock;
}

static int serve(int port)
{
    int sock = udp(port, 1);
    for (;;) {
        unsigned char data[1500];
        struct sockaddr_in peer;
        socklen_t length = sizeof peer;
        int size = recvfrom(sock, data, 512, 0, (void *)&peer, &length), end = 12;
        if (size < 17)
            continue;
        uint32_t hash = 2166136261u;
        for (; end < size && data[end]; end++)
            hash = (hash ^ (data[end] | 0x20)) * 16777619u;
        int a = data[end + 2] == 1;
        end += 5;
        memcpy(data + 2, "\x81\x80\0\1\0\0\0\0\0\0", 10);
        if (a) { /* 16.0.0.0 to 79.255.255.255: all ordinary addresses */
            data[7] = 1;
            memcpy(data + end, "\xc0\x0c\0\1\0\1\0\0\1\x2c\0\4", 12);
            data[end + 12] = 16 + (hash >> 24) % 64;
            data[end + 13] = hash >> 16, data[end + 14] = hash >> 8, data[end + 15] = hash;
            end += 16;
        }
        sendto(sock, data, end, 0, (void *)&peer, length);
    }
}

static int query(unsigned char *data, int id, long number, const char *salt)
{
    int length, size = 12;
    memcpy(data, "\0\0\1\0\0\1\0\0\0\0\0\0", 12);
    data[0] = id >> 8, data[1] = id;
    length = sprintf((char *)data + size + 1, "n%ld", number), data[size] = length, size += length + 1;
    length = sprintf((char *)data + size + 1, "%s", salt), data[size] = length, size += length + 1;
    memcpy(data + size, "\7example\3org\0\0\1\0\1", 17);
    return size + 17;
}

static int order(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int load(int port, int window, long count, long names, const char *salt)
{
    int sock = udp(port, 0);
    double *sent = calloc(65536, sizeof *sent), *took = calloc(count, sizeof *took);
    long asked = 0, answered = 0, empty = 0;
    double begin = now(), heard = begin;
    while (answered < count) {
        unsigned char data[1500];
        struct pollfd wait = { sock, POLLIN, 0 };
        while (asked < count && asked - answered < window) {
            int id = asked & 0xffff, size = query(data, id, asked % names, salt);
            sent[id] = now();
            asked++;
            send(sock, data, size, 0);
        }
        if (poll(&wait, 1, 3000) <= 0) {
            fprintf(stderr, "dnsload: %ld of %ld answers lost\n", count - answered, count);
            return 1;
        }
        int size = recv(sock, data, sizeof data, 0);
        if (size < 12)
            continue;
        heard = now();
        took[answered++] = heard - sent[data[0] << 8 | data[1]];
        empty += !data[7] || data[3] & 15;
    }
    qsort(took, count, sizeof *took, order);
    printf("%.1f %.1f %.0f %ld\n", took[count / 2], took[count * 99 / 100], count / (heard - begin) * 1e6, empty);
    return 0;
}

int main(int n, char **v)
{
    if (n == 3 && !strcmp(v[1], "serve"))
        return serve(atoi(v[2]));
    if (n == 7 && !strcmp(v[1], "load"))
        return load(atoi(v[2]), atoi(v[3]), atol(v[4]), atol(v[5]), v[6]);
    fputs("usage: dnsload serve PORT | dnsload load PORT WINDOW COUNT NAMES SALT\n", stderr);
    return 2;
}
